//! `protect: sync`: the active's ACK gate and its guard, and the sync channel to the standby.
//!
//! The gate's maps are a model; what decides is [`rfsis_common::ack_gate`], as in the kernel.

use super::*;
use crate::guard::Guard;
use crate::sync::{Record, Snapshot};

/// A datagram of the sync channel: when it arrives, for whom, whether an answer is wanted, what it says.
#[derive(Debug)]
struct Datagram {
    at: Nanos,
    to_standby: bool,
    ping: bool,
    records: Vec<Record>,
}

/// The active's gate with its guard.
#[derive(Debug)]
pub struct Gate {
    pub guard: Guard,
    pub maps: Maps,
    channel: VecDeque<Datagram>,
    /// Datagrams of the sync channel that are lost, per mille.
    pub sync_loss: u64,
    pub silent_standby: bool,
    /// The active's connections tell nothing of themselves.
    pub no_snapshots: bool,
    /// OPEN records that the active said.
    pub told_of: usize,
}

impl Gate {
    pub fn new(now: Nanos) -> Self {
        let mut guard = guard(30 * MS, true);
        guard.go_active(now);
        Self {
            guard,
            maps: Maps {
                now,
                ..Maps::default()
            },
            channel: VecDeque::new(),
            sync_loss: 0,
            silent_standby: false,
            no_snapshots: false,
            told_of: 0,
        }
    }

    /// As if the gate had noted nothing yet of a flow on which the client and the kernel have sent so many
    /// bytes each.
    pub fn unsee(&mut self, flow: FlowKey, bytes: u32) {
        let sent = &mut self.maps.sent[self.maps.guarded[&flow].slot as usize];
        sent.version = 0;
        for number in [&mut sent.next, &mut sent.ack, &mut sent.told] {
            *number = number.wrapping_sub(bytes);
        }
    }

    /// What becomes of a packet that the active's kernel sends.
    fn leave(&mut self, packet: Vec<u8>) -> Option<Vec<u8>> {
        let (_, packet) = self.maps.judge(packet);
        let now = self.maps.now;
        while let Some(opening) = self.maps.openings.pop_front() {
            match opening {
                Opening::Packet(kind, packet) => {
                    self.guard
                        .process_opening(&packet, kind, now, &mut self.maps);
                }
                Opening::Agreed(flow, agreed, at) => {
                    self.guard.process_agreed(flow, agreed, at, &mut self.maps);
                }
            }
        }
        packet
    }

    /// Whether the standby may have a copy of what a client sent.
    fn copies(&self, packet: &[u8]) -> bool {
        let (flow, segment) = parse(packet, Direction::ToVip).unwrap();
        match (self.maps.sent_next(&flow), segment.ack) {
            (Some(next), Some(ack)) => !before(next, ack),
            _ => true,
        }
    }

    fn next_wakeup(&self) -> Nanos {
        let channel = self.channel.iter().map(|d| d.at).min();
        self.guard.next_wakeup().min(channel.unwrap_or(Nanos::MAX))
    }
}

impl Lab {
    /// A lab whose active guards its flows, with a tap that shows handshakes only of what it sends.
    pub fn guarded(seed: u64) -> Self {
        let config = FlowsConfig {
            guarded: true,
            copied: true,
            ..config()
        };
        let mut lab = Self::with_config(seed, config);
        lab.gate = Some(Gate::new(lab.now));
        // The first pings find the standby.
        lab.run_for(10 * MS);
        assert!(
            lab.gate
                .as_ref()
                .is_some_and(|gate| gate.guard.is_guarding())
        );
        lab
    }

    /// The standby's agent is another one from now on.
    pub fn restart_standby(&mut self) {
        let now = self.now;
        let config = FlowsConfig {
            guarded: true,
            copied: true,
            ..config()
        };
        self.flows = Flows::new(config).unwrap();
        self.world.live.clear();
        self.tap_waiting = None;
        for track in self.world.tracks.values_mut() {
            track.forget_shown();
        }
        if let Some(gate) = &mut self.gate {
            gate.maps.now = now;
            gate.channel.clear();
            gate.guard.peer_changed(now, &mut gate.maps);
        }
        self.run_gate();
    }

    /// What the active's kernel sends goes through its gate.
    pub(super) fn leave_active(&mut self, packet: Vec<u8>) {
        let now = self.now;
        let Some(gate) = &mut self.gate else {
            return self.post(packet, Direction2::FromVip);
        };
        gate.maps.now = now;
        let (flow, segment) = parse(&packet, Direction::FromVip).unwrap();
        let opens = segment.syn;
        if let Some(track) = self.world.tracks.get_mut(&flow) {
            track.kernel_says(&segment);
        }
        match gate.leave(packet.clone()) {
            Some(packet) => {
                self.check_told(&packet);
                self.post(packet, Direction2::FromVip);
            }
            None if opens => self.tap(&held(packet), Direction::FromVip),
            None => {}
        }
        self.run_gate();
    }

    /// The promise: no client is told of a byte that the standby does not hold.
    fn check_told(&self, packet: &[u8]) {
        let (flow, segment) = parse(packet, Direction::FromVip).unwrap();
        let gate = self.gate.as_ref().unwrap();
        let (Some(track), Some(ack)) = (self.world.tracks.get(&flow), segment.ack) else {
            return;
        };
        if segment.rst || !gate.guard.guards(flow) {
            return;
        }
        let held = track.shown + u64::from(track.fin.is_some_and(|fin| fin <= track.shown));
        let told = distance(track.client_isn.wrapping_add(1), ack);
        assert!(
            i64::from(told) <= held as i64,
            "the client is told of {told} bytes, the standby holds {held}"
        );
    }

    /// A client's SYN reaches the active.
    pub(super) fn syn_arrives(&mut self, packet: &[u8]) {
        let now = self.now;
        if let Some(gate) = &mut self.gate {
            gate.guard
                .process_opening(packet, OpeningKind::Syn, now, &mut gate.maps);
        }
    }

    pub(super) fn is_copied(&self, packet: &[u8], direction: Direction) -> bool {
        match (&self.gate, direction) {
            (None, _) => true,
            (Some(gate), Direction::ToVip) => gate.copies(packet),
            (Some(gate), Direction::FromVip) => {
                let (flow, segment) = parse(packet, direction).unwrap();
                let known = gate.maps.guarded.contains_key(&flow);
                // Of a SYN-ACK that is released the standby got a copy when it was held.
                let opens = segment.syn && !(known && gate.maps.guarding);
                opens || segment.fin || segment.rst || !known
            }
        }
    }

    pub(super) fn gate_wakeup(&self) -> Nanos {
        self.gate.as_ref().map_or(Nanos::MAX, Gate::next_wakeup)
    }

    /// The standby confirms what it has got.
    pub(super) fn confirm(&mut self) {
        let mut records = vec![];
        self.flows.take_confirmations(|record| records.push(record));
        if !records.is_empty() {
            self.send_datagram(false, false, records);
        }
    }

    fn send_datagram(&mut self, to_standby: bool, ping: bool, records: Vec<Record>) {
        let at = self.now + 20_000 + self.rng.below(self.faults.jitter + 1);
        let Some(gate) = &mut self.gate else {
            return;
        };
        let opens = records.iter().filter(|r| matches!(r, Record::Open(_)));
        gate.told_of += opens.count();
        if gate.silent_standby || self.rng.happens(gate.sync_loss) {
            return;
        }
        gate.channel.push_back(Datagram {
            at,
            to_standby,
            ping,
            records,
        });
    }

    /// Guard and channel do what is due.
    pub(super) fn run_gate(&mut self) {
        let now = self.now;
        loop {
            let Some(gate) = &mut self.gate else {
                return;
            };
            gate.maps.now = now;
            if now >= gate.guard.next_wakeup() {
                gate.guard.poll(now, &mut gate.maps);
            }
            let mut records = vec![];
            let ping = gate.guard.take_records(&mut records);
            let wanted = std::mem::take(&mut gate.maps.wanted);
            let released = gate.maps.take_released();
            let due = gate.channel.iter().position(|d| d.at <= now);
            let datagram = due.and_then(|at| gate.channel.remove(at));
            for packet in released {
                self.check_told(&packet);
                self.post(packet, Direction2::FromVip);
            }
            if ping || !records.is_empty() {
                self.send_datagram(true, ping, records);
            }
            for (flow, join) in wanted {
                self.tell_snapshot(flow, join);
            }
            match datagram {
                None => return,
                Some(datagram) if datagram.to_standby => {
                    for record in &datagram.records {
                        self.standby_hears(record);
                    }
                    self.confirm();
                    if datagram.ping {
                        self.send_datagram(false, false, vec![]);
                    }
                }
                Some(datagram) => {
                    let Some(gate) = &mut self.gate else {
                        return;
                    };
                    gate.guard.heard(now, &mut gate.maps);
                    for record in &datagram.records {
                        if let Record::Confirm(confirm) = record
                            && gate.maps.take(confirm)
                        {
                            continue;
                        }
                        gate.guard.process_record(record, now, &mut gate.maps);
                    }
                }
            }
        }
    }

    /// The connection's server tells what it is about, at once.
    fn tell_snapshot(&mut self, flow: FlowKey, join: u32) {
        let snapshot = self.snapshot(flow);
        let now = self.now;
        let Some(gate) = &mut self.gate else {
            return;
        };
        let snapshot = snapshot.filter(|_| !gate.no_snapshots);
        if let Some(track) = self.world.tracks.get_mut(&flow) {
            track.offered = snapshot.clone();
        }
        gate.guard
            .process_snapshot(flow, join, snapshot, now, &mut gate.maps);
    }

    /// What the active's kernel and its server know of a connection.
    pub fn snapshot(&mut self, flow: FlowKey) -> Option<Snapshot> {
        let track = self.world.tracks.get(&flow)?;
        let active = self.active.as_mut()?;
        let remote = Some((CLIENT, flow.client_port).into());
        let server = self
            .servers
            .iter()
            .rfind(|server| active.socket(server.handle).remote_endpoint() == remote)?;
        snapshot(track, active, server)
    }

    fn standby_hears(&mut self, record: &Record) {
        let now = self.now;
        if let Record::Offer(offer) = record
            && let Some(track) = self.world.tracks.get_mut(&offer.flow)
            && track.arriving.replace(offer.join) != Some(offer.join)
        {
            // For the judge: it begins anew.
            track.forget_shown();
        }
        let refused = match *record {
            Record::Open(open) if !self.flows.process_open(&open, now, &mut self.world) => {
                Some((open.flow, open.client_isn))
            }
            Record::Told {
                flow,
                client_isn,
                ack,
            } if !self.flows.process_told(flow, client_isn, ack) => Some((flow, client_isn)),
            Record::Close { flow, client_isn } => {
                self.flows.process_close(flow, client_isn, &mut self.world);
                None
            }
            Record::Offer(ref offer) => {
                self.flows.process_offer(offer, now, &mut self.world);
                None
            }
            Record::Part(ref part) => {
                self.flows.process_part(part, now, &mut self.world);
                self.judge_restored(part.flow);
                None
            }
            _ => None,
        };
        if let Some((flow, client_isn)) = refused {
            self.send_datagram(false, false, vec![Record::Refuse { flow, client_isn }]);
        }
    }

    /// A shadow that was made of a snapshot holds what that says.
    fn judge_restored(&mut self, flow: FlowKey) {
        let Some(Flow::Shadow(shadow)) = self.flows.flows.get(&flow) else {
            return;
        };
        if let Some(track) = self.world.tracks.get_mut(&flow)
            && let Some(snapshot) = track
                .offered
                .take_if(|snapshot| snapshot.client_isn() == shadow.handshake().client_isn)
        {
            track.show_snapshot(&snapshot);
        }
    }
}
