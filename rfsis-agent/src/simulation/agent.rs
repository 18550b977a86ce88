//! A machine: a kernel and the agent on it. The agent's shadow thread does here what [`crate::engine`] does, in
//! the same order, with models of rings and sockets.

use std::net::Ipv4Addr;
use std::time::Duration;

use rfsis_common::agree;
use rfsis_common::maps::State as NodeKind;
use rfsis_common::prompt::{self, PromptSeen};

use super::*;
use crate::cli::Role;
use crate::engine::Command;
use crate::exchange::Exchange;
use crate::fault::faulty;
use crate::flows::{Flows, TakeoverReport};
use crate::metrics::{FlowCondition, FrameResult};
use crate::node::{Node, NodeConfig};
use crate::pledge::Pledges;
use crate::sync::{Channel, Prompts, Snapshot};

const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";

/// The sync channel's.
const PORT: u16 = 5566;

/// Datagrams that the sync channel's socket holds.
const SOCKET: usize = 128;

/// Between two looks at what the ring lost, ns.
const LOST_INTERVAL: Nanos = 50 * MS;

/// Half of the prompt datagrams may wait so long, ns, to be taken while the agent is at work.
const PROMPT_WAITS: Nanos = 100_000;

/// For so long after the shadow thread ran its program may answer for it, ns.
const PROMISE: Nanos = 200 * MS;

/// Everything that both nodes are told by their config.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) setup: Setup,
    pub(crate) interval: Nanos,
    pub(crate) missed: u32,
    /// `protect_timeout`, ns.
    pub(crate) timeout: Nanos,
    /// Bytes that all shadows of a node may hold.
    pub(crate) memory: usize,
    /// From something that wakes the shadow thread until it runs, ns.
    pub(crate) latency: Nanos,
    /// Bytes of a client from which on the standby's program confirms by itself.
    pub(crate) pledged_from: u64,
}

impl Terms {
    pub(crate) fn takeover_time(&self) -> Nanos {
        self.interval * Nanos::from(self.missed)
    }

    pub(crate) fn lease(&self) -> Nanos {
        if faulty!(LongLease) {
            2 * self.takeover_time()
        } else {
            self.takeover_time() - self.interval / 2
        }
    }
}

pub(crate) const GRACE: Nanos = 300 * MS;

pub(crate) fn address(machine: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, 1 + machine as u8)
}

/// What has happened on a machine, for the judge.
#[derive(Debug)]
pub(crate) enum Note {
    /// The node did this.
    Stepped(Stepped),
    /// The shadows are about to go live; with `protect: async`, how they are.
    GoesLive(Vec<View>),
    /// They are; of these flows there is a shadow.
    WentLive(TakeoverReport, HashSet<FlowKey>),
    /// What the shadows held is forgotten.
    Forgot,
    /// The kernels have agreed on an opening.
    Agreed,
    /// A kernel has taken a live flow.
    Adopted(Numbers),
    /// A datagram that counted before counts again.
    CountedTwice,
    /// For the trace.
    Said(String),
}

/// The agent.
pub(crate) struct Agent {
    pub(crate) session: u64,
    pub(crate) pulse: Pulse,
    pub(crate) flows: Flows,
    pub(crate) exchange: Option<Exchange>,
    pub(crate) datagrams: VecDeque<Vec<u8>>,
    /// Those that have counted, by their tags.
    counted: HashSet<u64>,
    /// Snapshots that were asked for, and when they are there.
    asked: VecDeque<(Nanos, FlowKey, u32)>,
    /// When the shadow thread runs for what has come in.
    due: Nanos,
    next_lost: Nanos,
    /// Until when the shadow thread does not run, and the whole agent does not.
    pub(crate) engine_stalled: Nanos,
    pub(crate) stalled: Nanos,
    /// After so many steps of the heartbeat thread it stalls until a time.
    pub(crate) stall: Option<(u32, Nanos)>,
}

/// A machine.
pub(crate) struct Machine {
    pub(crate) index: usize,
    pub(crate) terms: Terms,
    pub(crate) kernel: Kernel,
    pub(crate) world: World,
    pub(crate) agent: Option<Agent>,
    pub(crate) notes: Vec<Note>,
    /// Prints what happens.
    pub(crate) trace: bool,
    /// The services had time when they were looked at last.
    served: bool,
}

impl Machine {
    pub(crate) fn new(
        index: usize,
        terms: Terms,
        seed: u64,
        tweaks: BTreeMap<u16, Tweaks>,
        adopts: bool,
    ) -> Self {
        Self {
            index,
            terms,
            kernel: Kernel::new(terms.setup, seed, tweaks),
            world: World {
                adopts,
                ..World::default()
            },
            agent: None,
            notes: vec![],
            trace: false,
            served: false,
        }
    }

    /// The agent is started; what an older one left is removed.
    pub(crate) fn start(&mut self, session: u64, now: Nanos) {
        let (own, peer) = (self.index, 1 - self.index);
        let mac = |machine: usize| [2, 0, 0, 0, 0, 1 + machine as u8];
        let role = if own == 0 {
            Role::Primary
        } else {
            Role::Backup
        };
        let node = NodeConfig {
            role,
            node: address(own),
            peer: address(peer),
            mac: mac(own),
            tap_mac: mac(own),
            interval: Duration::from_nanos(self.terms.interval),
            missed: self.terms.missed,
            lease: Duration::from_nanos(self.terms.lease()),
            startup_grace: Duration::from_nanos(GRACE),
            session,
        };
        self.kernel.load();
        self.world.clear();
        let Setup { sync, mirror } = self.terms.setup;
        let config = FlowsConfig {
            guarded: sync,
            copied: mirror,
            max_bytes: self.terms.memory,
            ..config()
        };
        let (timeout, interval) = (self.terms.timeout, self.terms.interval);
        let exchange = || {
            let channel = Channel::new(KEY, "demo", address(own), address(peer), session);
            let mut prompts = Prompts::new(KEY, "demo", address(own), address(peer), PORT);
            prompts.share(self.kernel.maps.prompted.clone());
            let guard = guard(timeout, mirror);
            let mut exchange = Exchange::new(channel, prompts, session, guard, timeout, interval);
            let words = self.kernel.maps.pledges.clone();
            exchange.pledges = Pledges::new(words, SLOTS as u32, self.terms.pledged_from);
            exchange
        };
        self.agent = Some(Agent {
            session,
            pulse: Pulse::new(Node::new(node, now)),
            flows: Flows::new(config).expect("smoltcp answers a SYN"),
            exchange: sync.then(exchange),
            datagrams: VecDeque::new(),
            counted: HashSet::default(),
            asked: VecDeque::new(),
            due: now,
            next_lost: now,
            engine_stalled: 0,
            stalled: 0,
            stall: None,
        });
        self.notes.push(Note::Forgot);
    }

    /// The agent is killed.
    pub(crate) fn kill(&mut self, now: Nanos) {
        self.agent = None;
        self.kernel.lose_agent(now);
        self.world.live.clear();
    }

    /// When there is something to do.
    pub(crate) fn next_wakeup(&self) -> Nanos {
        let incoming = self.kernel.maps.incoming.front();
        let incoming = incoming.map_or(Nanos::MAX, |(until, _)| *until);
        let kernel = self.kernel.next_wakeup().min(incoming);
        let Some(agent) = &self.agent else {
            return kernel;
        };
        let pulse = agent.pulse.next_wakeup().max(agent.stalled);
        let engine = agent.engine_wakeup(&self.kernel);
        kernel.min(pulse).min(engine)
    }

    /// Something came in for the shadow thread.
    pub(crate) fn wake(&mut self, now: Nanos) {
        let latency = self.terms.latency;
        if let Some(agent) = &mut self.agent {
            agent.due = agent.due.min(now + latency);
        }
    }

    /// A datagram of the sync channel comes in.
    pub(crate) fn receive_datagram(&mut self, datagram: Vec<u8>, now: Nanos) {
        if datagram.starts_with(&prompt::MAGIC) {
            // As good as chance, and the same in each run of a seed: its tag.
            let waits = datagram.last().is_some_and(|byte| byte & 1 == 0);
            let until = now + if waits { PROMPT_WAITS } else { 0 };
            return self.kernel.maps.receive_prompt(until, datagram);
        }
        if datagram.starts_with(&agree::MAGIC) {
            let maps = &mut self.kernel.maps;
            if maps.take_answer(&datagram, now) {
                self.notes.push(Note::Agreed);
                return self.flush(now);
            }
        }
        self.keep_datagram(datagram, now);
    }

    /// It waits for the shadow thread.
    fn keep_datagram(&mut self, datagram: Vec<u8>, now: Nanos) {
        if let Some(agent) = &mut self.agent
            && agent.datagrams.len() < SOCKET
        {
            agent.datagrams.push_back(datagram);
        }
        self.wake(now);
    }

    /// Does what is due.
    pub(crate) fn run(&mut self, now: Nanos) {
        self.run_pulse(now);
        let runs = self
            .agent
            .as_ref()
            .is_some_and(|agent| agent.engine_wakeup(&self.kernel) <= now);
        if runs {
            self.run_engine(now);
        }
        self.take_prompts(now);
        let serves = self.agent.as_ref().is_some_and(|a| a.stalled <= now);
        if serves && !self.served {
            self.kernel.hurry(now);
        }
        self.served = serves;
        self.kernel.run(serves, &mut self.world.approved, now);
        let wakes = !self.kernel.held.is_empty()
            || !self.kernel.maps.openings.is_empty()
            || !self.kernel.maps.wanted.is_empty();
        if wakes {
            self.wake(now);
        }
    }

    /// What its guard guards.
    pub(crate) fn words(&self) -> Words {
        let Some(agent) = &self.agent else {
            return Words::new();
        };
        let flows = self.world.tracks.keys().copied();
        flows
            .filter_map(|flow| Some((flow, agent.guards(flow)?)))
            .collect()
    }

    /// The connections that it has, on whatever stack.
    pub(crate) fn connections(&self) -> Vec<FlowKey> {
        let agent = self.agent.as_ref();
        let shadows = self.world.tracks.keys().copied();
        let live = shadows.filter(|flow| agent.is_some_and(|agent| agent.lives(*flow)));
        self.kernel
            .connections
            .keys()
            .copied()
            .chain(live)
            .collect()
    }

    fn run_pulse(&mut self, now: Nanos) {
        while let Some(agent) = &mut self.agent
            && agent.stalled <= now
        {
            if let Some((steps, until)) = &mut agent.stall {
                match steps.checked_sub(1) {
                    Some(left) => *steps = left,
                    None => {
                        agent.stalled = *until;
                        agent.stall = None;
                        return;
                    }
                }
            }
            let copied_to = self.kernel.peer;
            let stepped = agent.pulse.step(&mut self.kernel, now);
            if self.kernel.peer != copied_to {
                agent.due = agent.due.min(now);
            }
            let Some(mut stepped) = stepped else {
                return;
            };
            if stepped.yielded.is_some() {
                // The shadow thread has not heard of it.
                let flows = || self.world.tracks.keys().copied();
                let guards = |flow| Some((flow, agent.guarded_for(flow)?));
                stepped.last_words = Some(flows().filter_map(guards).collect());
                let lives = flows().filter(|flow| agent.lives(*flow));
                stepped.dropped.extend(lives);
            }
            if !agent.pulse.commands.is_empty() {
                agent.due = agent.due.min(now);
            }
            if self.trace {
                for fact in &stepped.facts {
                    self.notes.push(Note::Said(fact.to_string()));
                }
            }
            self.notes.push(Note::Stepped(stepped));
        }
    }

    // ---- the shadow thread ---------------------------------------------------------------------

    fn run_engine(&mut self, now: Nanos) {
        let Some(mut agent) = self.agent.take() else {
            return;
        };
        agent.due = Nanos::MAX;
        self.kernel.maps.closed = !self.kernel.may_speak(now);
        self.world.closed = self.kernel.maps.closed;
        self.take_frames(&mut agent, Nanos::MAX, now);
        while let Some(command) = agent.pulse.commands.pop_front() {
            match command {
                Command::GoLive { at } => self.go_live(&mut agent, at, now),
                Command::GoStandby => {
                    agent.flows.go_standby(&mut self.world);
                    if let Some(exchange) = &mut agent.exchange {
                        exchange.go_standby(&mut self.kernel.maps);
                        take_openings(exchange, &mut self.kernel.maps, now);
                    }
                    agent.asked.clear();
                    self.notes.push(Note::Forgot);
                }
                // What is sent on after a handover is as good as lost here.
                _ => {}
            }
        }
        while let Some(held) = self.kernel.held.pop_front() {
            let doubted = agent.exchange.as_mut().is_some_and(|exchange| {
                take_openings(exchange, &mut self.kernel.maps, now);
                exchange.guard.doubts(&held)
            });
            if !doubted {
                agent.flows.process_held(&held, &mut self.world);
            }
        }
        if now >= agent.flows.next_wakeup() {
            agent.flows.poll(now, &mut self.world);
            let (exchange, maps) = (&mut agent.exchange, &mut self.kernel.maps);
            agent.flows.adopt_some(now, &mut self.world, |numbers| {
                if let Some(exchange) = exchange {
                    exchange.guard.adopt(numbers, now, maps);
                }
            });
        }
        self.give_to_services(now);
        self.run_exchange(&mut agent, now);
        if now >= agent.next_lost {
            agent.next_lost = now + LOST_INTERVAL;
            self.take_lost(&mut agent);
            // The ring is empty.
            if let Some(exchange) = &mut agent.exchange {
                let (flows, maps) = (&mut agent.flows, &mut self.kernel.maps);
                exchange.pledges.check(flows, &mut self.world, maps);
            }
        }
        let promises = agent.flows.has_room();
        self.kernel.maps.agreement.promise = if promises { now + PROMISE } else { 0 };
        self.flush(now);
        self.agent = Some(agent);
    }

    fn take_frames(&mut self, agent: &mut Agent, until: Nanos, now: Nanos) {
        while let Some(frame) = self.kernel.ring.pop_front() {
            let late = frame.arrival > until;
            self.take_frame(agent, frame, now);
            if late {
                return;
            }
        }
    }

    fn take_frame(&mut self, agent: &mut Agent, frame: Mirrored, now: Nanos) {
        if !self.counts(&frame) {
            return;
        }
        let Mirrored {
            direction, packet, ..
        } = frame;
        // What the peer says does not concern a live shadow.
        if direction == Direction::ToVip || !agent.flows.is_live() {
            self.world.show(&packet, direction);
        }
        let (flows, world) = (&mut agent.flows, &mut self.world);
        let result = if frame.answered {
            flows.process_answered(&packet, frame.arrival, world)
        } else {
            flows.process_frame(&packet, direction, frame.arrival, world)
        };
        let of_live_flow = frame.state == NodeKind::Active;
        if result == FrameResult::UnknownFlow
            && of_live_flow
            && let Ok((flow, _)) = parse(&packet, direction)
            && self
                .kernel
                .connections
                .get(&flow)
                .is_some_and(|c| c.adopted)
        {
            self.kernel.stack(&packet, &mut self.world.approved, now);
        }
    }

    /// Whether a frame is taken for the shadows, as [`crate::engine`] judges it.
    pub(crate) fn counts(&self, frame: &Mirrored) -> bool {
        if self.terms.setup.mirror && frame.state != NodeKind::Active {
            frame.from_peer
        } else {
            frame.direction == Direction::ToVip || frame.from_peer
        }
    }

    fn go_live(&mut self, agent: &mut Agent, at: Nanos, now: Nanos) {
        self.take_frames(agent, at, now);
        self.take_lost(agent);
        if let (Some(exchange), Some(at)) = (&agent.exchange, agent.pulse.shown.peer_lived_until)
            && exchange.was_deaf(at)
        {
            agent.flows.expose();
        }
        let views = if self.terms.setup.sync {
            vec![]
        } else {
            self.views(agent, at)
        };
        self.notes.push(Note::GoesLive(views));
        let mut report = agent.flows.go_live(now, &mut self.world);
        let unanswered = std::mem::take(&mut report.unanswered);
        let flows = self.world.tracks.keys().copied();
        let there = flows.filter(|flow| agent.flows.knows(*flow)).collect();
        self.notes.push(Note::WentLive(report, there));
        if let Some(exchange) = &mut agent.exchange {
            set_term(exchange, agent.pulse.shown, &mut self.kernel.maps, now);
            exchange.go_active(now);
        }
        for syn in unanswered {
            if let Some(exchange) = &mut agent.exchange {
                let opening = rfsis_common::ack_gate::OpeningKind::Syn;
                exchange
                    .guard
                    .process_opening(&syn, opening, now, &mut self.kernel.maps);
            }
            self.kernel.stack(&syn, &mut self.world.approved, now);
        }
    }

    /// How the flows are, and up to where their clients' bytes are there, those in the ring included.
    fn views(&self, agent: &Agent, at: Nanos) -> Vec<View> {
        let view = |(flow, track): (&FlowKey, &Track)| {
            let held = self.held(*flow, track, at);
            let shown = track.client_isn.wrapping_add(1).wrapping_add(held as u32);
            (*flow, agent.flows.condition(*flow), shown)
        };
        self.world.tracks.iter().map(view).collect()
    }

    /// Up to where a client's bytes are there, from the first, what has come into the ring until `at` included; a FIN counts one.
    pub(crate) fn held(&self, flow: FlowKey, track: &Track, at: Nanos) -> u64 {
        let mut shown = (track.shown, track.fin);
        let frames = || self.kernel.ring.iter().filter(|frame| frame.arrival <= at);
        if frames().next().is_some() {
            let mut track = track.clone();
            for frame in frames().filter(|frame| self.counts(frame)) {
                if let Ok((of, segment)) = parse(&frame.packet, frame.direction)
                    && (of, frame.direction) == (flow, Direction::ToVip)
                {
                    track.show(&segment);
                }
            }
            shown = (track.shown, track.fin);
        }
        let (shown, fin) = shown;
        shown + u64::from(fin.is_some_and(|fin| fin <= shown))
    }

    fn take_lost(&mut self, agent: &mut Agent) {
        for (flow, at) in self.kernel.lost.drain(..) {
            agent.flows.mark_lost(flow, at);
        }
    }

    fn give_to_services(&mut self, now: Nanos) {
        for (numbers, unfinished) in std::mem::take(&mut self.world.adopted) {
            let track = self.world.tracks.get(&numbers.flow);
            let first = track.map_or(numbers.rcv_nxt, |t| t.client_isn.wrapping_add(1));
            self.kernel.adopt(&numbers, unfinished, first, now);
            self.notes.push(Note::Adopted(numbers));
        }
    }

    fn run_exchange(&mut self, agent: &mut Agent, now: Nanos) {
        let shown = agent.pulse.shown;
        let Some(exchange) = &mut agent.exchange else {
            return;
        };
        let copied = !self.terms.setup.mirror || !self.kernel.peer.is_nobody();
        let (maps, world) = (&mut self.kernel.maps, &mut self.world);
        maps.now = now;
        set_term(exchange, shown, maps, now);
        exchange.set_copied(copied, now);
        take_openings(exchange, maps, now);
        while let Some(datagram) = agent.datagrams.pop_front() {
            let from = address(1 - self.index);
            if datagram.starts_with(&agree::MAGIC) {
                if let Ok(answer) = exchange.open_answer(&datagram, from) {
                    take_openings(exchange, maps, now);
                    exchange.process_answer(&answer, now, maps);
                }
                continue;
            }
            if datagram.starts_with(&prompt::MAGIC) {
                let Ok((confirms, seen)) = exchange.open_prompt(&datagram, from, maps.seen) else {
                    continue;
                };
                maps.seen = seen;
                exchange.process_prompt(confirms, now, maps);
                continue;
            }
            let Ok(opened) = exchange.open(&datagram, from, shown.epoch, now, maps) else {
                continue;
            };
            let tag = datagram
                .last_chunk::<8>()
                .map_or(0, |tag| u64::from_be_bytes(*tag));
            if !agent.counted.insert(tag) {
                self.notes.push(Note::CountedTwice);
            }
            for record in opened.records.clone() {
                world.note_record(&record);
                if self.trace {
                    let words = format!("hears {record:?}");
                    self.notes
                        .push(Note::Said(words.chars().take(160).collect()));
                }
            }
            exchange.process(opened, now, &mut agent.flows, world, maps);
            world.note_restored(&agent.flows);
        }
        while let Some((_, flow, join)) = agent.asked.pop_front_if(|(at, ..)| *at <= now) {
            let snapshot = self.kernel.snapshot(&flow);
            self.snapshot_taken(exchange, flow, join, snapshot, now);
        }
        let out = &mut self.kernel.out;
        let say = |datagram: &[u8]| out.push(Out::Datagram(datagram.to_vec()));
        let maps = &mut self.kernel.maps;
        exchange.dispatch(shown.epoch, now, &mut agent.flows, maps, say);
        for (flow, join) in std::mem::take(&mut self.kernel.maps.wanted) {
            agent
                .asked
                .push_back((now + self.terms.latency, flow, join));
        }
        let _ = exchange.guard.take_joins();
        for fact in exchange.guard.take_facts() {
            if self.trace {
                self.notes.push(Note::Said(format!("{fact:?}")));
            }
        }
    }

    fn snapshot_taken(
        &mut self,
        exchange: &mut Exchange,
        flow: FlowKey,
        join: u32,
        snapshot: Option<Snapshot>,
        now: Nanos,
    ) {
        exchange
            .guard
            .process_snapshot(flow, join, snapshot, now, &mut self.kernel.maps);
    }

    /// What the programs take by themselves, and then tell clients.
    fn take_prompts(&mut self, now: Nanos) {
        let is_closed = !self.kernel.may_speak(now);
        let maps = &mut self.kernel.maps;
        maps.now = now;
        maps.closed = is_closed;
        maps.take_incoming(now);
        for datagram in std::mem::take(&mut maps.left) {
            self.keep_datagram(datagram, now);
        }
        self.flush(now);
    }

    /// What shadows and guard have sent goes through the gate.
    fn flush(&mut self, now: Nanos) {
        let released = self.terms.setup.sync;
        for packet in std::mem::take(&mut self.world.sent) {
            self.kernel
                .leave(packet, released, &mut self.world.approved, now);
        }
        for packet in self.kernel.maps.take_released() {
            self.kernel
                .leave(packet, true, &mut self.world.approved, now);
        }
    }
}

fn set_term(exchange: &mut Exchange, shown: Shown, maps: &mut Maps, now: Nanos) {
    let peer = exchange.set_term(shown.peer_session, shown.epoch, now, maps);
    if let Some((prompt, agree)) = peer {
        (maps.prompt_peer, maps.seen) = (prompt, PromptSeen::default());
        maps.agreement.peer = agree;
        take_openings(exchange, maps, now);
    }
}

fn take_openings(exchange: &mut Exchange, maps: &mut Maps, now: Nanos) {
    while let Some(opening) = maps.openings.pop_front() {
        let guard = &mut exchange.guard;
        match opening {
            Opening::Packet(kind, packet) => guard.process_opening(&packet, kind, now, maps),
            Opening::Agreed(flow, agreed, at) => guard.process_agreed(flow, agreed, at, maps),
        }
    }
}

impl Agent {
    fn engine_wakeup(&self, kernel: &Kernel) -> Nanos {
        let exchange = self
            .exchange
            .as_ref()
            .map_or(Nanos::MAX, |e| e.next_wakeup());
        let asked = self.asked.front().map_or(Nanos::MAX, |(at, ..)| *at);
        let lost = if kernel.lost.is_empty() {
            Nanos::MAX
        } else {
            self.next_lost
        };
        let stalled = self.stalled.max(self.engine_stalled);
        self.due
            .min(self.flows.next_wakeup())
            .min(exchange)
            .min(asked)
            .min(lost)
            .max(stalled)
    }

    /// Whether the ACK gate's guard says that the standby holds all that this flow's client was told.
    pub(crate) fn guards(&self, flow: FlowKey) -> Option<Word> {
        // What the shadow thread says that has not heard yet of the end of its epoch counts for nothing.
        let is_over = self.pulse.commands.contains(&Command::GoStandby);
        self.guarded_for(flow).filter(|_| !is_over)
    }

    /// Whether it is on a live shadow.
    fn lives(&self, flow: FlowKey) -> bool {
        self.flows.condition(flow) == Some(FlowCondition::Live)
    }

    fn guarded_for(&self, flow: FlowKey) -> Option<Word> {
        let exchange = self.exchange.as_ref()?;
        let (session, epoch) = (exchange.peer_session()?, exchange.epoch()?);
        exchange
            .guard
            .guards(flow)
            .then_some(Word { session, epoch })
    }

    /// Whether it is about the standby that this agent is: the same agent, which has not been active since.
    pub(crate) fn honours(&self, word: Word) -> bool {
        word.session == self.session && word.epoch > self.pulse.attempted
    }

    /// The same of the standby that it was until it has just taken over.
    pub(crate) fn honoured(&self, word: Word) -> bool {
        word.session == self.session && word.epoch > self.pulse.attempted_before
    }

    /// Whether its node is, whatever it was before.
    pub(crate) fn is_standby(&self) -> bool {
        self.pulse.node.state() == NodeKind::Standby
    }
}
