//! Two machines, a client and a LAN, and what goes wrong there.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::*;
use crate::heartbeat::Heartbeat;
use crate::metrics::FlowCondition;

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
    edges: BTreeMap<FlowKey, u32>,
    promises: Promises,
}

macro_rules! say {
    ($cluster:expr, $($words:tt)+) => {
        if $cluster.trace {
            println!("{:>12.3} ms  {}", $cluster.now as f64 / MS as f64, format!($($words)+));
        }
    };
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
        let tally = &mut self.promises.tally;
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

    /// A segment of the client's enters the LAN.
    fn post(&mut self, packet: Vec<u8>) {
        let (flow, segment) = parse(&packet, Direction::ToVip).expect("a sound packet");
        if segment.syn {
            for machine in &mut self.machines {
                let tracks = &mut machine.world.tracks;
                if tracks
                    .get(&flow)
                    .is_none_or(|t| t.client_isn != segment.seq)
                {
                    tracks.insert(flow, Track::of_syn(&segment));
                }
            }
        }
        let Some(owner) = self.owner else {
            return;
        };
        let lan = self.scenario.lan;
        let mut copies = vec![];
        if lan.overlaps > 0 && segment.payload.len() > 1 && self.rng.happens(lan.overlaps) {
            let skip = 1 + self.rng.below(segment.payload.len() as u64 - 1) as usize;
            copies.push(rewrite(&packet, |repr| {
                repr.seq_number += skip;
                repr.payload = &repr.payload[skip..];
            }));
        }
        if self.rng.happens(lan.duplicates) {
            copies.push(packet.clone());
        }
        copies.push(packet);
        for packet in copies {
            let delay = self.delay();
            if !self.is_lost(Lost::Packets, lan.loss) {
                self.at(
                    delay,
                    Event::Arrives {
                        at: owner,
                        packet: packet.clone(),
                        direction: Direction::ToVip,
                        for_us: true,
                        from_peer: false,
                    },
                );
            }
            if !self.scenario.terms.setup.mirror && !self.is_lost(Lost::Copies, lan.copy_loss) {
                let delay = delay + self.rng.below(lan.copy_jitter + 1);
                self.at(
                    delay,
                    Event::Arrives {
                        at: 1 - owner,
                        packet,
                        direction: Direction::ToVip,
                        for_us: false,
                        from_peer: false,
                    },
                );
            }
        }
    }

    fn delay(&mut self) -> Nanos {
        self.now + 50_000 + self.rng.below(self.scenario.lan.jitter + 1)
    }

    /// Whether something is lost that gets lost at this rate when all is well.
    fn is_lost(&mut self, what: Lost, usual: u64) -> bool {
        let now = self.now;
        let rates = self.spells.iter().filter_map(|spell| match spell.trouble {
            Trouble::Lose {
                what: lost, rate, ..
            } if lost == what && now < spell.until => Some(rate),
            _ => None,
        });
        let rate = rates.max().unwrap_or(0).max(usual);
        self.rng.happens(rate)
    }

    fn is_unplugged(&self, place: Place) -> bool {
        matches!(place, Place::Machine(machine) if self.now < self.unplugged[machine])
    }

    fn is_cut(&self, from: Place, to: Place) -> bool {
        if self.is_unplugged(from) || self.is_unplugged(to) {
            return true;
        }
        self.spells.iter().any(|spell| {
            matches!(spell.trouble, Trouble::Cut { from: f, to: t, .. } if (f, t) == (from, to))
                && self.now < spell.until
        })
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

    /// Something leaves a machine.
    fn leave(&mut self, from: usize, out: Out) {
        if self.is_unplugged(Place::Machine(from)) {
            return;
        }
        let to = 1 - from;
        let lan = self.scenario.lan;
        match out {
            Out::Packet(packet) => self.leave_for_client(from, packet),
            Out::Copy(packet, direction) => {
                if self.is_lost(Lost::Copies, lan.copy_loss) {
                    return;
                }
                let at = self.now + self.rng.below(lan.copy_jitter + 1);
                let event = Event::Arrives {
                    at: to,
                    packet,
                    direction,
                    for_us: true,
                    from_peer: true,
                };
                self.at(at, event);
            }
            Out::Heartbeat(heartbeat) => {
                self.record(from, Recorded::Heartbeat(heartbeat));
                if !self.is_lost(Lost::Heartbeats, 0) {
                    self.at(self.now, Event::Heartbeat(to, heartbeat));
                }
            }
            Out::Datagram(datagram) => {
                self.record(from, Recorded::Datagram(datagram.clone()));
                if !self.is_lost(Lost::Datagrams, lan.datagram_loss) {
                    let at = self.now + 20_000 + self.rng.below(lan.jitter + 1);
                    self.at(at, Event::Datagram(to, datagram));
                }
            }
            Out::Announce => {
                say!(self, "{}: announces the VIP", name(from));
                self.at(self.now + 30_000, Event::Announce(from));
            }
        }
    }

    fn record(&mut self, from: usize, message: Recorded) {
        let replays = |(_, trouble): &(Nanos, Trouble)| matches!(trouble, Trouble::Replay { .. });
        if self.scenario.troubles.iter().any(replays) {
            let recorded = &mut self.recorded[from];
            if recorded.len() == RECORDED {
                recorded.pop_front();
            }
            recorded.push_back(message);
        }
    }

    fn leave_for_client(&mut self, from: usize, packet: Vec<u8>) {
        self.check_told(from, &packet);
        let lan = self.scenario.lan;
        let Ok((flow, segment)) = parse(&packet, Direction::FromVip) else {
            return;
        };
        let rst = segment.rst;
        if let Some(ack) = segment.ack.filter(|_| !rst) {
            let told = self.told.entry(flow).or_insert(ack);
            *told = later(*told, ack);
        }
        if segment.syn {
            self.answered.insert(flow);
        }
        if !self.scenario.terms.setup.mirror && !self.is_lost(Lost::Copies, lan.copy_loss) {
            let at = self.now + self.rng.below(lan.copy_jitter + 1);
            let event = Event::Arrives {
                at: 1 - from,
                packet: packet.clone(),
                direction: Direction::FromVip,
                for_us: false,
                from_peer: true,
            };
            self.at(at, event);
        }
        // An RST is sent once: a client that waits to be spoken to would not hear of a lost one.
        if !rst && self.is_lost(Lost::Packets, lan.loss) {
            return;
        }
        let copies = 1 + u64::from(self.rng.happens(lan.duplicates));
        for _ in 0..copies {
            let at = self.delay();
            let packet = packet.clone();
            self.at(at, Event::ToClient { from, packet });
        }
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
        let held = track.shown + u64::from(track.fin.is_some_and(|fin| fin <= track.shown));
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

    fn arrive(
        &mut self,
        at: usize,
        packet: &[u8],
        direction: Direction,
        for_us: bool,
        from_peer: bool,
    ) {
        let from = if from_peer {
            Place::Machine(1 - at)
        } else {
            Place::Client
        };
        if self.is_cut(from, Place::Machine(at)) || self.now < self.off[at] {
            return;
        }
        let Ok((flow, segment)) = parse(packet, direction) else {
            return;
        };
        say!(
            self,
            "{} gets {}{} {}",
            name(at),
            if from_peer { "a copy: " } else { "" },
            flow.client_port,
            Brief(&segment)
        );
        if direction == Direction::ToVip && !from_peer {
            for machine in &mut self.machines {
                if let Some(track) = machine.world.tracks.get_mut(&flow) {
                    track.client_says(&segment);
                }
            }
        }
        let machine = &mut self.machines[at];
        let whose = (for_us && !from_peer, from_peer);
        machine
            .kernel
            .receive(&mut machine.world, packet, direction, whose, self.now);
        machine.wake(self.now);
    }

    fn reach_client(&mut self, from: usize, packet: &[u8]) {
        if self.is_cut(Place::Machine(from), Place::Client) {
            return;
        }
        let Ok((flow, segment)) = parse(packet, Direction::FromVip) else {
            return;
        };
        say!(
            self,
            "client gets of {}: {} {}",
            name(from),
            flow.client_port,
            Brief(&segment)
        );
        for machine in &mut self.machines {
            if let Some(track) = machine.world.tracks.get_mut(&flow) {
                track.hear(&segment);
            }
        }
        self.client.receive(packet);
        self.client_next = self.now;
    }

    fn begin(&mut self, index: usize) {
        let (_, trouble) = self.scenario.troubles[index];
        say!(self, "TROUBLE {index}: {trouble}");
        let machine = |who| match who {
            Who::Active => self.active,
            Who::Standby => 1 - self.active,
        };
        let until = self.now + trouble.time();
        if trouble.splits() {
            let Terms { interval, .. } = self.scenario.terms;
            let settles = 4 * interval + self.scenario.terms.takeover_time() * 2;
            self.split_until = self.split_until.max(until + settles);
        }
        match trouble {
            Trouble::Kill { who, .. } => {
                let victim = machine(who);
                self.kill(victim);
                self.at(until, Event::Start(victim));
            }
            Trouble::Reboot { who, .. } => {
                let victim = machine(who);
                self.kill(victim);
                let fallen = &mut self.machines[victim];
                let tweaks = std::mem::take(&mut fallen.kernel.tweaks);
                fallen.kernel = Kernel::new(self.scenario.terms.setup, self.rng.next(), tweaks);
                self.off[victim] = self.off[victim].max(until);
                self.at(until, Event::Start(victim));
            }
            Trouble::Pause { who, steps, .. } => {
                if let Some(agent) = &mut self.machines[machine(who)].agent {
                    agent.stall = Some((steps, until));
                }
            }
            Trouble::Stall { who, .. } => {
                if let Some(agent) = &mut self.machines[machine(who)].agent {
                    agent.engine_stalled = until;
                }
            }
            Trouble::Unplug { who, .. } => {
                let victim = machine(who);
                self.unplugged[victim] = self.unplugged[victim].max(until);
                self.show_carrier(victim, false);
                self.at(until, Event::Plugged(victim));
            }
            Trouble::Cut { .. } | Trouble::Lose { .. } => {
                self.spells.push(Spell { trouble, until });
            }
            Trouble::Switchover => {
                if let Some(agent) = &mut self.machines[self.active].agent {
                    agent.pulse.hand_over = true;
                }
            }
            Trouble::Replay { count } => self.replay(count),
        }
    }

    fn show_carrier(&mut self, machine: usize, carrier: bool) {
        if let Some(agent) = &mut self.machines[machine].agent {
            agent.pulse.carrier.push_back(carrier);
        }
    }

    fn kill(&mut self, victim: usize) {
        let fallen = &self.machines[victim];
        let Some(agent) = &fallen.agent else {
            return;
        };
        // A standby's words are those of its own last epoch, of which somebody may still be about to hear.
        if !agent.is_standby() {
            let (words, dropped) = (fallen.words(), fallen.connections());
            self.note_end(victim, words, &dropped);
        }
        self.machines[victim].kill(self.now);
        // The epoch is in no file: it lives on in who has heard of it.
        self.heard[victim] = 0;
    }

    fn replay(&mut self, count: u64) {
        for _ in 0..count {
            let from = self.rng.below(2) as usize;
            let at = self.rng.below(self.recorded[from].len() as u64) as usize;
            let Some(message) = self.recorded[from].get(at).cloned() else {
                continue;
            };
            self.promises.tally.replayed += 1;
            let event = match message {
                Recorded::Heartbeat(heartbeat) => Event::Heartbeat(1 - from, heartbeat),
                Recorded::Datagram(datagram) => Event::Datagram(1 - from, datagram),
            };
            self.at(self.now + self.rng.clone().below(5 * MS), event);
        }
    }
}

/// What a standby with `protect: async` says of a flow, and what of it was shown.
pub(crate) type View = (FlowKey, Option<FlowCondition>, u32);

fn name(machine: usize) -> &'static str {
    ["a", "b"][machine]
}
