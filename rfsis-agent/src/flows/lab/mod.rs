//! A whole network in one process, on a virtual clock: clients, the active, its standby's [`Flows`],
//! the node that takes over, and a lossy wire between them with a tap.
//!
//! ```text
//!  client stack ──► wire (loss, jitter, duplicates) ──► hub ──► active stack | heir's kernel
//!                                                        └────► tap (loss, swaps) ──► Flows ──► heir's kernel
//! ```
//!
//! Everything that a live shadow sends is checked against what the flow's active had promised.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use rfsis_common::ack_gate::OpeningKind;
use rfsis_common::maps::{Direction, FlowKey, HeldEvent};
use smoltcp::socket::tcp::State;

use super::{Flow, Flows, FlowsConfig, TakeoverReport};
use crate::handler::HandlerKind;
use crate::heartbeat::Nanos;
use crate::lockstep::{before, distance};
use crate::segment::{Segment, parse};
pub(crate) use crate::simulation::*;

mod gate;

pub use gate::*;

/// Per mille, but for the times (ns).
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub loss: u64,
    pub duplicates: u64,
    pub jitter: Nanos,
    pub tap_loss: u64,
    pub tap_swaps: u64,
}

/// When it arrives, in which order it was sent, where it goes, what it is.
type InFlight = (Nanos, u64, Direction2, Vec<u8>);

/// Decides on one segment: true loses it.
pub type Filter = Box<dyn FnMut(&Segment<'_>, Direction) -> bool>;

pub struct Lab {
    /// Prints what arrives.
    pub trace: bool,
    pub now: Nanos,
    pub events: u64,
    rng: Rng,
    pub faults: Faults,
    wire: BinaryHeap<Reverse<InFlight>>,
    posted: u64,
    client: Host,
    active: Option<Host>,
    heir: Host,
    servers: Vec<Server>,
    heir_servers: Vec<Server>,
    adopted: Vec<Adopted>,
    pub conns: Vec<Conn>,
    pub flows: Flows,
    pub world: World,
    taken_over: bool,
    tap_waiting: Option<(Vec<u8>, Direction)>,
    pub lose: Filter,
    pub lose_copy: Filter,
    /// The tap sees what the client does not get.
    pub lose_at_client: bool,
    /// Flows whose RST reached a client that was not through with them.
    pub told: Vec<FlowKey>,
    /// What an active of another mind runs.
    pub other_mind: Option<HandlerKind>,
    /// With `protect: sync`, until the active dies.
    pub gate: Option<Gate>,
}

/// [`Direction`], ordered so that it can be in a heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Direction2 {
    ToVip,
    FromVip,
}

impl From<Direction2> for Direction {
    fn from(direction: Direction2) -> Self {
        match direction {
            Direction2::ToVip => Direction::ToVip,
            Direction2::FromVip => Direction::FromVip,
        }
    }
}

impl Lab {
    pub fn new(seed: u64) -> Self {
        Self::with_config(seed, config())
    }

    pub fn with_config(seed: u64, config: FlowsConfig) -> Self {
        let now = SECOND;
        Self {
            trace: std::env::var("RFSIS_TRACE").is_ok(),
            now,
            events: 0,
            rng: Rng(seed),
            faults: Faults::default(),
            wire: BinaryHeap::new(),
            posted: 0,
            client: Host::new(CLIENT, seed ^ 1, now, true),
            active: Some(Host::new(VIP, seed ^ 2, now, false)),
            heir: Host::new(VIP, seed ^ 3, now, false),
            servers: vec![],
            heir_servers: vec![],
            adopted: vec![],
            conns: vec![],
            flows: Flows::new(config).unwrap(),
            world: World::default(),
            taken_over: false,
            tap_waiting: None,
            lose: Box::new(|_, _| false),
            lose_copy: Box::new(|_, _| false),
            lose_at_client: false,
            told: vec![],
            other_mind: None,
            gate: None,
        }
    }

    /// Opens a connection; the server's side listens on whoever is active.
    pub fn connect(&mut self, plan: Plan, tweaks: Tweaks) -> usize {
        let port = 40_000 + self.conns.len() as u16;
        self.connect_from(port, plan, tweaks)
    }

    pub fn connect_from(&mut self, port: u16, plan: Plan, tweaks: Tweaks) -> usize {
        let kind = config().services[&plan.service];
        let active_ticks = tweaks.timestamps.then_some(active_ticks as fn() -> u32);
        let mut listener = socket(tweaks.active_buffer, active_ticks);
        listener.listen((VIP, plan.service)).unwrap();
        let handler = self.other_mind.unwrap_or(kind).stream();
        let (host, servers) = match &mut self.active {
            Some(active) => (active, &mut self.servers),
            None => (&mut self.heir, &mut self.heir_servers),
        };
        let handle = host.sockets.add(listener);
        servers.push(Server::new(handle, handler));
        if let Some(isn) = tweaks.active_isn {
            host.wanted.insert(port, isn);
        }

        let ticks = tweaks.timestamps.then_some(client_ticks as fn() -> u32);
        let mut socket = socket(tweaks.client_buffer, ticks);
        socket
            .connect(self.client.iface.context(), (VIP, plan.service), port)
            .unwrap();
        self.client.plain.insert(port, tweaks);
        self.client.wanted.remove(&port);
        if let Some(isn) = tweaks.client_isn {
            self.client.wanted.insert(port, isn);
        }
        let handle = self.client.sockets.add(socket);
        self.conns.push(Conn::new(port, plan, handle));
        self.conns.len() - 1
    }

    pub fn client_state(&mut self, conn: usize) -> State {
        let handle = self.conns[conn].handle;
        self.client.socket(handle).state()
    }

    /// A packet of a stack or a shadow enters the wire.
    fn post(&mut self, packet: Vec<u8>, direction: Direction2) {
        let (_, segment) = parse(&packet, direction.into()).expect("a sound packet");
        // An RST is sent once: a client that waits to be spoken to would not hear of a lost one.
        let lossy = !segment.rst;
        if (self.lose)(&segment, direction.into()) || (lossy && self.rng.happens(self.faults.loss))
        {
            return;
        }
        let copies = 1 + u64::from(self.rng.happens(self.faults.duplicates));
        for _ in 0..copies {
            let delay = 50_000 + self.rng.below(self.faults.jitter + 1);
            self.posted += 1;
            let entry = (self.now + delay, self.posted, direction, packet.clone());
            self.wire.push(Reverse(entry));
        }
    }

    fn arrive(&mut self, packet: &[u8], direction: Direction2) {
        let (flow, segment) = parse(packet, direction.into()).expect("a sound packet");
        if self.trace {
            let (now, brief) = (self.now, Brief(&segment));
            eprintln!("{now} {direction:?} {} {brief}", flow.client_port);
        }
        match direction {
            Direction2::ToVip => {
                if segment.syn {
                    let tracks = &mut self.world.tracks;
                    if tracks
                        .get(&flow)
                        .is_none_or(|t| t.client_isn != segment.seq)
                    {
                        tracks.insert(flow, Track::of_syn(&segment));
                    }
                }
                if let Some(track) = self.world.tracks.get_mut(&flow) {
                    track.client_says(&segment);
                }
                if segment.syn {
                    self.syn_arrives(packet);
                }
                if self.taken_over && !self.world.live.contains(&flow) {
                    self.heir_of(flow, segment.syn).receive(packet);
                } else if self.taken_over || self.is_copied(packet, direction.into()) {
                    self.tap(packet, direction.into());
                }
                if let Some(active) = &mut self.active {
                    active.receive(packet);
                }
            }
            Direction2::FromVip => {
                if !self.taken_over && self.is_copied(packet, direction.into()) {
                    self.tap(packet, direction.into());
                }
                if self.lose_at_client {
                    return;
                }
                if !self.taken_over
                    && let Some(track) = self.world.tracks.get_mut(&flow)
                {
                    track.hear(&segment);
                }
                if segment.rst
                    && let Some(conn) = self.conns.iter().rfind(|conn| conn.flow() == flow)
                    && !conn.ended
                {
                    self.told.push(flow);
                }
                self.client.receive(packet);
            }
        }
    }

    fn tap(&mut self, packet: &[u8], direction: Direction) {
        let (_, segment) = parse(packet, direction).expect("a sound packet");
        let faulty = !self.taken_over;
        if faulty
            && ((self.lose_copy)(&segment, direction) || self.rng.happens(self.faults.tap_loss))
        {
            return;
        }
        // A SYN-ACK that comes late is a case of its own.
        if faulty
            && !segment.syn
            && self.tap_waiting.is_none()
            && self.rng.happens(self.faults.tap_swaps)
        {
            self.tap_waiting = Some((packet.to_vec(), direction));
            return;
        }
        self.show(packet, direction);
        self.flush_tap();
    }

    fn flush_tap(&mut self) {
        if let Some((packet, direction)) = self.tap_waiting.take() {
            self.show(&packet, direction);
        }
    }

    /// The standby gets a copy.
    pub fn show(&mut self, packet: &[u8], direction: Direction) {
        if let Ok((flow, segment)) = parse(packet, direction)
            && let Some(track) = self.world.tracks.get_mut(&flow)
        {
            match direction {
                Direction::ToVip => track.show(&segment),
                Direction::FromVip => track.active(&segment),
            }
        }
        self.flows
            .process_frame(packet, direction, self.now, &mut self.world);
        self.collect();
        self.confirm();
    }

    /// The stack that has this flow; a SYN ends what was adopted.
    fn heir_of(&mut self, flow: FlowKey, syn: bool) -> &mut Host {
        if syn {
            self.adopted.retain(|adopted| adopted.flow != flow);
        }
        let adopted = self.adopted.iter_mut().find(|a| a.flow == flow);
        adopted.map_or(&mut self.heir, |adopted| &mut adopted.host)
    }

    /// How many flows the kernel has taken.
    pub fn adoptions(&self) -> usize {
        self.adopted.len()
    }

    fn collect(&mut self) {
        for (numbers, unfinished) in std::mem::take(&mut self.world.adopted) {
            // Services approve before they close.
            self.world.approved.insert(numbers.flow);
            let adopted = Adopted::new(&numbers, unfinished, self.now);
            self.adopted.push(adopted);
        }
        for packet in std::mem::take(&mut self.world.sent) {
            self.post(packet, Direction2::FromVip);
        }
    }

    /// The next thing happens.
    pub fn step(&mut self) {
        let now = self.now;
        let mut at = self.wire.peek().map_or(Nanos::MAX, |Reverse((at, ..))| *at);
        at = at.min(self.client.poll_at(now)).min(self.heir.poll_at(now));
        if let Some(active) = &mut self.active {
            at = at.min(active.poll_at(now));
        }
        at = at.min(self.flows.next_wakeup().max(now));
        at = at.min(self.gate_wakeup().max(now));
        for conn in &self.conns {
            at = at.min(conn.wakes_at(now));
        }
        for adopted in &mut self.adopted {
            at = at.min(adopted.host.poll_at(now));
        }
        self.now = at.max(now);
        self.events += 1;
        TICKS.set((self.now / MS) as u32);
        if let Some(Reverse((due, ..))) = self.wire.peek()
            && *due <= self.now
            && let Some(Reverse((_, _, direction, packet))) = self.wire.pop()
        {
            self.arrive(&packet, direction);
        }
        self.run_hosts();
        self.run_gate();
        if self.now >= self.flows.next_wakeup() {
            self.flows.poll(self.now, &mut self.world);
            self.flows.adopt_some(self.now, &mut self.world, |_| {});
            self.collect();
        }
    }

    fn run_hosts(&mut self) {
        for _ in 0..2 {
            for packet in self.client.poll(self.now) {
                self.post(packet, Direction2::ToVip);
            }
            for conn in &mut self.conns {
                conn.run(&mut self.client, self.now);
            }
            if let Some(active) = &mut self.active {
                for server in &mut self.servers {
                    server.run(active);
                }
                let sent = active.poll(self.now);
                for packet in sent {
                    self.leave_active(packet);
                }
            }
        }
        for server in &mut self.heir_servers {
            server.run(&mut self.heir);
        }
        let mut sent = self.heir.poll(self.now);
        for Adopted { host, server, .. } in &mut self.adopted {
            server.run(host);
            sent.extend(host.poll(self.now));
        }
        for packet in sent {
            self.leave_heir(packet);
        }
    }

    /// What the heir's kernel says goes through the gate.
    fn leave_heir(&mut self, packet: Vec<u8>) {
        let (flow, segment) = parse(&packet, Direction::FromVip).unwrap();
        if segment.syn {
            self.world.approved.remove(&flow);
        }
        if (segment.fin || segment.rst) && !self.world.approved.contains(&flow) {
            let held = HeldEvent {
                flow,
                seq: segment.seq,
                ack: segment.ack.unwrap_or(0),
                flags: if segment.rst { 4 } else { 1 } | if segment.ack.is_some() { 16 } else { 0 },
                ..HeldEvent::default()
            };
            self.flows.process_held(&held, &mut self.world);
            self.collect();
            return;
        }
        self.post(packet, Direction2::FromVip);
    }

    pub fn run_until(&mut self, limit: Nanos, mut reached: impl FnMut(&mut Lab) -> bool) -> bool {
        let end = self.now.saturating_add(limit);
        while self.now < end {
            if reached(self) {
                return true;
            }
            self.step();
        }
        reached(self)
    }

    pub fn run_for(&mut self, time: Nanos) {
        let end = self.now + time;
        self.run_until(time, |lab| lab.now >= end);
    }

    /// The active falls silent; what it sent is still on its way.
    pub fn crash(&mut self) {
        self.active = None;
        self.gate = None;
        self.servers.clear();
        // The service listens on the heir as well, for whoever connects anew.
        for conn in &self.conns {
            let mut listener = socket(65_535, None);
            listener.listen((VIP, conn.plan.service)).unwrap();
            let handle = self.heir.sockets.add(listener);
            let handler = config().services[&conn.plan.service].stream();
            self.heir_servers.push(Server::new(handle, handler));
        }
    }

    /// The standby becomes active.
    pub fn take_over(&mut self) -> TakeoverReport {
        self.flush_tap();
        self.taken_over = true;
        let report = self.flows.go_live(self.now, &mut self.world);
        self.collect();
        report
    }

    /// Crash now, detection after `pause`.
    pub fn fail_over(&mut self, pause: Nanos) -> TakeoverReport {
        self.crash();
        self.run_for(pause);
        self.take_over()
    }

    pub fn is_done(&mut self, conn: usize) -> bool {
        let state = self.client_state(conn);
        let conn = &self.conns[conn];
        conn.ended && conn.got >= conn.plan.want && matches!(state, State::Closed | State::TimeWait)
    }

    /// Everybody gets what it wanted, nobody is reset, and nothing is left behind.
    pub fn finish(&mut self) {
        self.settle();
        for conn in &self.conns {
            assert!(
                !conn.reset,
                "port {} was reset after {} bytes",
                conn.port, conn.got
            );
        }
        assert_eq!(self.told, [], "nobody is reset");
    }

    /// Everybody gets what it wanted or is told that it will not, and nothing is left behind.
    pub fn settle(&mut self) {
        let count = self.conns.len();
        let done = self.run_until(900 * SECOND, |lab| {
            (0..count).all(|conn| lab.is_done(conn) || lab.conns[conn].reset)
        });
        for index in 0..count {
            let is_done = done || self.is_done(index);
            let state = self.client_state(index);
            let conn = &self.conns[index];
            // Its SYN-ACK came from the active, the copy was lost, and it waits to be spoken to: nobody
            // knows of it, as after any restart of a server.
            let half_open = self.faults.tap_loss > 0 && conn.got == 0 && conn.sent == 0;
            assert!(
                is_done || conn.reset || half_open,
                "port {} hangs: sent {} of {}, got {} of {}, {state}, {:?}",
                conn.port,
                conn.sent,
                conn.plan.upload,
                conn.got,
                conn.plan.want,
                self.flows.flows.get(&conn.flow())
            );
        }
        self.clear();
    }

    /// What has ended is forgotten in time.
    pub fn clear(&mut self) {
        self.run_for(130 * SECOND);
        assert!(
            self.world.live.is_empty(),
            "left in LIVE_FLOWS: {:?}, {:?}",
            self.world.live,
            self.flows.flows
        );
        assert_eq!(self.flows.bytes, 0, "bytes are still counted");
    }
}
