//! Two machines and a client on a LAN, one event after the other, and what is held of them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::*;
use crate::heartbeat::Heartbeat;
use crate::metrics::FlowCondition;

macro_rules! say {
    ($cluster:expr, $($words:tt)+) => {
        if $cluster.trace {
            println!("{:>12.3} ms  {}", $cluster.now as f64 / MS as f64, format!($($words)+));
        }
    };
}

mod lan;
mod trouble;

/// A run is over so long after the trouble, ns: a client that has backed off repeats itself within a minute.
const PATIENCE: Nanos = 150 * SECOND;

/// More steps than any run takes.
const STEPS: u64 = 2_000_000;

/// What is recorded to be replayed, of each node.
const RECORDED: usize = 256;

#[derive(Debug)]
enum Event {
    Opens(usize),
    Trouble(usize),
    Start(usize),
    /// Its cable is there again.
    Plugged(usize),
    /// A packet of the VIP's: for whom it is, and whether the peer sends it.
    Arrives {
        at: usize,
        packet: Vec<u8>,
        direction: Direction,
        for_us: bool,
        from_peer: bool,
    },
    ToClient {
        from: usize,
        packet: Vec<u8>,
    },
    Heartbeat(usize, Heartbeat),
    Datagram(usize, Vec<u8>),
    Announce(usize),
}

/// When, in which order it came about, and what.
struct Entry(Nanos, u64, Event);

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

#[derive(Clone, Debug)]
enum Recorded {
    Heartbeat(Heartbeat),
    Datagram(Vec<u8>),
}

/// What is switched off for a while.
#[derive(Clone, Copy, Debug)]
struct Spell {
    trouble: Trouble,
    until: Nanos,
}

/// A run.
pub(crate) struct Cluster {
    scenario: Scenario,
    trace: bool,
    now: Nanos,
    rng: Rng,
    queue: BinaryHeap<Reverse<Entry>>,
    posted: u64,
    client: Host,
    client_next: Nanos,
    conns: Vec<Conn>,
    machines: [Machine; 2],
    /// Whom the client's neighbour table names.
    owner: Option<usize>,
    /// Whose gate was open last.
    active: usize,
    /// Machines without power, until then.
    off: [Nanos; 2],
    /// Machines without a cable, until then.
    unplugged: [Nanos; 2],
    spells: Vec<Spell>,
    recorded: [VecDeque<Recorded>; 2],
    /// Two nodes may be active until then.
    split_until: Nanos,
    /// The highest epoch of an active peer that each agent was told of.
    heard: [u64; 2],
    /// What each client was told: the furthest acknowledgement that left, and the furthest edge that left
    /// while its flow was not guarded.
    told: BTreeMap<FlowKey, u32>,
    /// Flows of which a SYN-ACK has left.
    answered: HashSet<FlowKey>,
    /// Flows of which a node has said that it has no connection.
    disowned: HashSet<FlowKey>,
    edges: BTreeMap<FlowKey, u32>,
    promises: Promises,
}

impl Cluster {
    pub(crate) fn new(scenario: &Scenario, trace: bool) -> Self {
        let seed = scenario.seed;
        let tweaks: BTreeMap<u16, Tweaks> = scenario
            .opens
            .iter()
            .map(|opens| (opens.port, opens.tweaks))
            .collect();
        let machine = |index: usize| {
            let seed = seed ^ (index as u64 + 2) << 32;
            let tweaks = tweaks.clone();
            let mut machine = Machine::new(index, scenario.terms, seed, tweaks, scenario.adopts);
            machine.trace = trace;
            machine
        };
        let mut cluster = Self {
            trace,
            now: MS,
            rng: Rng(seed),
            queue: BinaryHeap::new(),
            posted: 0,
            client: Host::new(CLIENT, seed ^ 1, MS, true),
            client_next: Nanos::MAX,
            conns: vec![],
            machines: [machine(0), machine(1)],
            owner: None,
            active: 0,
            off: [0; 2],
            unplugged: [0; 2],
            spells: vec![],
            recorded: [VecDeque::new(), VecDeque::new()],
            split_until: 0,
            heard: [0; 2],
            told: BTreeMap::new(),
            answered: HashSet::default(),
            disowned: HashSet::default(),
            edges: BTreeMap::new(),
            promises: Promises::default(),
            scenario: scenario.clone(),
        };
        for (index, opens) in scenario.opens.iter().enumerate() {
            cluster.at(opens.at, Event::Opens(index));
        }
        for (index, (at, _)) in scenario.troubles.iter().enumerate() {
            cluster.at(*at, Event::Trouble(index));
        }
        for machine in 0..2 {
            cluster.at(MS, Event::Start(machine));
        }
        cluster
    }

    /// Runs to the end; what must hold holds, or it panics.
    pub(crate) fn run(mut self) -> Tally {
        let calm_at = self.scenario.calm_at();
        let end = calm_at + PATIENCE;
        while self.now < calm_at || !self.is_over() {
            if self.now >= end {
                self.complain();
            }
            hold!(
                NoPanic,
                self.promises.tally.events < STEPS,
                "more than {STEPS} steps"
            );
            self.step();
        }
        let ended = (0..self.conns.len()).filter(|index| self.is_done(*index));
        let (connections, ended) = (self.conns.len() as u64, ended.count() as u64);
        let lost = self.conns.iter().filter(|conn| conn.reset).count() as u64;
        let pledges_kept = self.machines.iter().map(|m| m.kernel.pledges_kept).sum();
        let tally = &mut self.promises.tally;
        tally.pledges_kept = pledges_kept;
        tally.runs = 1;
        tally.connections = connections;
        tally.ended = ended;
        tally.lost = lost;
        self.promises.tally
    }

    fn is_over(&self) -> bool {
        self.conns.len() == self.scenario.opens.len()
            && (0..self.conns.len()).all(|index| {
                self.is_done(index) || self.promises.is_exempt(&self.conns[index].flow())
            })
    }

    fn is_done(&self, index: usize) -> bool {
        let conn = &self.conns[index];
        let state = self.client.sockets.get::<Socket<'_>>(conn.handle).state();
        conn.ended && conn.got >= conn.plan.want && matches!(state, State::Closed | State::TimeWait)
    }

    fn complain(&self) -> ! {
        let hanging = (0..self.conns.len())
            .filter(|index| !self.is_done(*index))
            .map(|index| &self.conns[index])
            .find(|conn| !self.promises.is_exempt(&conn.flow()));
        match hanging {
            Some(conn) => broken(
                Invariant::Ends,
                format!(
                    "port {} hangs: sent {} of {}, got {} of {}, {}",
                    conn.port,
                    conn.sent,
                    conn.plan.upload,
                    conn.got,
                    conn.plan.want,
                    self.client.sockets.get::<Socket<'_>>(conn.handle).state()
                ),
            ),
            None => broken(Invariant::Ends, "a client does not open"),
        }
    }

    fn at(&mut self, at: Nanos, event: Event) {
        self.posted += 1;
        self.queue.push(Reverse(Entry(at, self.posted, event)));
    }

    fn step(&mut self) {
        let mut at = self.client_next;
        if let Some(Reverse(Entry(due, ..))) = self.queue.peek() {
            at = at.min(*due);
        }
        for machine in &self.machines {
            at = at.min(machine.next_wakeup());
        }
        self.now = self.now.max(at);
        self.promises.tally.events += 1;
        TICKS.set((self.now / MS) as u32);
        let is_due = |Reverse(entry): &Reverse<Entry>| entry.0 <= self.now;
        if self.queue.peek().is_some_and(is_due)
            && let Some(Reverse(Entry(_, _, event))) = self.queue.pop()
        {
            self.handle(event);
        }
        if self.client_next <= self.now {
            self.run_client();
        }
        for index in 0..2 {
            if self.machines[index].next_wakeup() <= self.now {
                self.run_machine(index);
            }
        }
        self.check_gates();
    }

    fn check_gates(&mut self) {
        // Without a cable nothing leaves, whatever a gate lets through: that a cut is noticed a moment late shows only
        // to who is plugged in again in that moment.
        let open = [0, 1].map(|m| {
            self.machines[m].kernel.may_speak(self.now) && !self.is_unplugged(Place::Machine(m))
        });
        if let Some(active) = open.iter().position(|open| *open) {
            self.active = active;
        }
        if open == [true, true] {
            hold!(
                OneGate,
                self.now < self.split_until,
                "both gates are open, and heartbeats arrive"
            );
            for conn in &self.conns {
                self.promises.exempt(conn.flow(), Exempt::TwoActives);
            }
        }
    }

    // ---- the client ----------------------------------------------------------------------------

    fn run_client(&mut self) {
        for _ in 0..2 {
            for packet in self.client.poll(self.now) {
                self.post(packet);
            }
            for index in 0..self.conns.len() {
                let conn = &mut self.conns[index];
                conn.run(&mut self.client, self.now);
                let flow = conn.flow();
                hold!(
                    NoReset,
                    !conn.reset || self.promises.is_exempt(&flow),
                    "port {} was reset, sent {}, got {}",
                    conn.port,
                    conn.sent,
                    conn.got
                );
            }
        }
        let conns = self.conns.iter().map(|conn| conn.wakes_at(self.now));
        let wakes = conns.min().unwrap_or(Nanos::MAX);
        self.client_next = self.client.poll_at(self.now).min(wakes);
    }

    fn open(&mut self, index: usize) {
        let Opens {
            port, plan, tweaks, ..
        } = self.scenario.opens[index];
        let ticks = tweaks.timestamps.then_some(client_ticks as fn() -> u32);
        let mut socket = socket(tweaks.client_buffer, ticks);
        socket
            .connect(self.client.iface.context(), (VIP, plan.service), port)
            .expect("a socket that is new");
        self.client.plain.insert(port, tweaks);
        if let Some(isn) = tweaks.client_isn {
            self.client.wanted.insert(port, isn);
        }
        let handle = self.client.sockets.add(socket);
        self.conns.push(Conn::new(port, plan, handle));
        self.client_next = self.now;
    }

    // ---- machines ------------------------------------------------------------------------------

    fn run_machine(&mut self, index: usize) {
        self.machines[index].run(self.now);
        for note in std::mem::take(&mut self.machines[index].notes) {
            self.note(index, note);
        }
        for out in std::mem::take(&mut self.machines[index].kernel.out) {
            self.leave(index, out);
        }
    }

    /// Whether a client has a connection, and is not through with it.
    fn is_open(&self, conn: &Conn) -> bool {
        let state = self.client.sockets.get::<Socket<'_>>(conn.handle).state();
        match state {
            State::Closed | State::TimeWait => false,
            State::SynSent => self.answered.contains(&conn.flow()),
            // Both have said all, and what the server has not forgotten yet is to come to its end.
            State::Closing | State::LastAck => !self.disowned.contains(&conn.flow()),
            _ => true,
        }
    }

    fn note(&mut self, index: usize, note: Note) {
        match note {
            Note::Said(what) => say!(self, "{}: {what}", name(index)),
            Note::Stepped(Stepped {
                took_over,
                goes_on,
                last_words,
                dropped,
                ..
            }) => {
                if let Some(words) = last_words {
                    self.note_end(index, words, &dropped);
                }
                let Some((_, epoch)) = took_over else {
                    return;
                };
                // Who has slept meanwhile finds its lease lapsed: what it does late opens nothing.
                if !self.machines[index].kernel.may_speak(self.now) {
                    return;
                }
                hold!(
                    EpochsGrow,
                    epoch > self.heard[index],
                    "takeover with epoch {epoch}, of one with {} it has heard",
                    self.heard[index]
                );
                let opened: Vec<FlowKey> = self
                    .conns
                    .iter()
                    .filter(|conn| self.is_open(conn))
                    .map(Conn::flow)
                    .collect();
                self.promises
                    .note_takeover(index, &self.machines, &opened, goes_on);
            }
            Note::GoesLive(_) if !self.machines[index].kernel.may_speak(self.now) => {}
            Note::GoesLive(views) => {
                let told = &self.told;
                let views = views
                    .into_iter()
                    .map(|(flow, condition, shown)| {
                        let all = told.get(&flow).is_none_or(|told| !before(shown, *told));
                        (flow, (condition, all))
                    })
                    .collect();
                let opened = self.conns.iter().filter(|conn| self.is_open(conn));
                let opened: Vec<FlowKey> = opened.map(Conn::flow).collect();
                self.promises.judge(&self.machines[index], &opened, &views);
            }
            Note::WentLive(report, there) => {
                say!(self, "{}: {report:?}", name(index));
                self.promises.check(&self.machines[index], &there);
            }
            Note::Forgot => {
                for track in self.machines[index].world.tracks.values_mut() {
                    track.forget_all();
                }
            }
            Note::Agreed => self.promises.tally.agreed += 1,
            Note::Adopted(numbers) => {
                say!(self, "{}: the kernel adopts {numbers:?}", name(index));
                self.promises.tally.adopted += 1;
            }
            Note::CountedTwice => broken(Invariant::Once, "a datagram counted twice"),
        }
    }

    /// A node that was active is no longer, and had these connections: those that it never called protected are
    /// lost, whoever is active next.
    fn note_end(&mut self, index: usize, words: Words, dropped: &[FlowKey]) {
        let sync = self.scenario.terms.setup.sync;
        let peer = self.machines[1 - index].agent.as_ref();
        for flow in dropped {
            let condition = peer.and_then(|agent| agent.flows.condition(*flow));
            let unheard = matches!(condition, None | Some(FlowCondition::Unprotected));
            if sync && !words.contains_key(flow) {
                self.promises.exempt(*flow, Exempt::Unguarded);
            } else if !sync && unheard {
                self.promises.exempt(*flow, Exempt::NotInLockstep);
            }
        }
        self.promises.note_end(index, words);
    }

    /// The promise of the ACK gate.
    fn check_told(&mut self, from: usize, packet: &[u8]) {
        if !self.scenario.terms.setup.sync {
            return;
        }
        let (flow, segment) = parse(packet, Direction::FromVip).expect("a sound packet");
        let standby = &self.machines[1 - from];
        let (Some(ack), Some(track)) = (
            segment.ack.filter(|_| !segment.rst),
            standby.world.tracks.get(&flow),
        ) else {
            return;
        };
        let shift = if segment.syn { 0 } else { track.shift };
        let edge = ack.wrapping_add(u32::from(segment.window) << shift);
        let known = self.edges.get(&flow).copied();
        let agent = standby.agent.as_ref();
        let confirms = agent.filter(|agent| {
            !segment.syn
                && !agent.flows.is_live()
                && !self.promises.is_exempt(&flow)
                && self
                    .promises
                    .guards(&self.machines[from], flow)
                    .is_some_and(|word| agent.honours(word))
        });
        let Some(agent) = confirms else {
            let furthest = known.map_or(edge, |known| later(known, edge));
            self.edges.insert(flow, furthest);
            return;
        };
        let held = standby.held(flow, track, self.now);
        let told = distance(track.client_isn.wrapping_add(1), ack);
        let port = flow.client_port;
        hold!(
            NotAhead,
            i64::from(told) <= held as i64,
            "port {port} is told of {told} bytes, the standby holds {held}"
        );
        if let Some(promised) = agent.flows.confirmed_edge(flow) {
            let most = known.map_or(promised, |known| later(known, promised));
            let beyond = distance(most, edge);
            hold!(
                NotWider,
                beyond <= 0,
                "port {port} is told of {beyond} bytes of room that the standby does not have"
            );
        }
    }

    // ---- what happens --------------------------------------------------------------------------

    fn handle(&mut self, event: Event) {
        match event {
            Event::Opens(index) => self.open(index),
            Event::Trouble(index) => self.begin(index),
            Event::Start(index) => {
                if self.machines[index].agent.is_none() && self.now >= self.off[index] {
                    let session = self.rng.next() | 1;
                    say!(self, "{}: starts, session {session:x}", name(index));
                    self.machines[index].start(session, self.now);
                    self.promises.note_start(index);
                    if self.is_unplugged(Place::Machine(index)) {
                        self.show_carrier(index, false);
                    }
                }
            }
            Event::Plugged(index) => {
                if self.now >= self.unplugged[index] {
                    say!(self, "{}: plugged in", name(index));
                    self.show_carrier(index, true);
                }
            }
            Event::Arrives {
                at,
                packet,
                direction,
                for_us,
                from_peer,
            } => self.arrive(at, &packet, direction, for_us, from_peer),
            Event::ToClient { from, packet } => self.reach_client(from, &packet),
            Event::Heartbeat(to, heartbeat) => {
                if !self.is_cut(Place::Machine(1 - to), Place::Machine(to))
                    && let Some(agent) = &mut self.machines[to].agent
                {
                    agent.pulse.ring.push_back((self.now, heartbeat));
                    let known = agent.pulse.node.peer_session() == Some(heartbeat.session);
                    if known && heartbeat.state == rfsis_common::maps::State::Active {
                        self.heard[to] = self.heard[to].max(heartbeat.epoch);
                    }
                }
            }
            Event::Datagram(to, datagram) => {
                if !self.is_cut(Place::Machine(1 - to), Place::Machine(to)) {
                    self.machines[to].receive_datagram(datagram, self.now);
                }
            }
            Event::Announce(from) => {
                if !self.is_cut(Place::Machine(from), Place::Client) {
                    self.owner = Some(from);
                }
            }
        }
    }
}

/// What a standby with `protect: async` says of a flow, and what of it was shown.
pub(crate) type View = (FlowKey, Option<FlowCondition>, u32);

fn name(machine: usize) -> &'static str {
    ["a", "b"][machine]
}
