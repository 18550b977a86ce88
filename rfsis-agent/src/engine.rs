//! The shadow thread: frames from the ring to the [`Flows`] and [`Datagrams`], and what live shadows say to
//! the wire.

mod effects;
mod rest;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use rfsis_common::maps::{Direction, FrameHeader, HeldEvent, State, frame_flags};

use crate::bpf::LostFlows;
use crate::datagrams::{self, Datagrams};
use crate::flows::{Effects, Flows, TakeoverReport};
use crate::heartbeat::{MacAddr, Nanos};
use crate::link::Link;
use crate::metrics::{FlowCondition, FrameResult, Metrics, ResetReason};
use crate::relay::Relay;
use crate::shared::Shared;
use crate::sys::{self, PacketSocket};

pub use effects::{KernelEffects, Restored};
pub use rest::Rest;

/// Frames taken from the ring before commands and timers are looked at again.
const BATCH: usize = 256;

/// Between two looks at what the ring lost, and two counts of the flows, ns.
const LOOK_INTERVAL: Nanos = 50_000_000;

/// Between two counts at least, in multiples of what one takes.
const CENSUS_SHARE: Nanos = 50;

/// What the heartbeat thread asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The kernel has been the active's since `at` (ns).
    GoLive {
        /// Frames that arrived before are still the standby's.
        at: Nanos,
    },
    /// The node has yielded.
    GoStandby,
    /// The gate was closed, and the VIP is offered to the peer.
    HandOver,
    /// The peer did not take it: the gate is open again.
    TakeBack,
    /// The peer has taken it; follows [`Command::GoStandby`].
    HandedOver {
        /// Hardware address of its end of the LAN.
        to: MacAddr,
    },
    /// The agent ends.
    Stop,
}

/// Gives commands to the shadow thread.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
}

impl EngineHandle {
    /// Never waits.
    pub fn send(&self, command: Command) {
        // Fails only when the thread has ended, and then nobody is to be told.
        let _ = self.commands.send(command);
        self.wake();
    }

    /// What threads show each other has changed: it is to look now.
    pub fn wake(&self) {
        // As above.
        let _ = self.wake.write(1);
    }
}

/// The other end of an [`EngineHandle`].
#[derive(Debug)]
pub struct Inbox {
    commands: Receiver<Command>,
    /// Those that were looked at and not yet taken.
    seen: VecDeque<Command>,
    wake: Arc<EventFd>,
}

impl Inbox {
    fn next(&mut self) -> Result<Command, TryRecvError> {
        match self.seen.pop_front() {
            Some(command) => Ok(command),
            None => self.commands.try_recv(),
        }
    }

    /// Whether the VIP was offered to the peer by a command that is still to be taken.
    fn has_hand_over(&mut self) -> bool {
        self.seen.extend(self.commands.try_iter());
        self.seen.contains(&Command::HandOver)
    }
}

/// A channel to the shadow thread.
///
/// # Errors
/// Of eventfd(2).
pub fn commands() -> nix::Result<(EngineHandle, Inbox)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::from_flags(
        EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
    )?);
    Ok((
        EngineHandle {
            commands: sender,
            wake: Arc::clone(&wake),
        },
        Inbox {
            commands: receiver,
            seen: VecDeque::new(),
            wake,
        },
    ))
}

/// What became of the flows at a takeover.
#[derive(Clone, Debug)]
pub struct FlowsTookOver {
    /// How many of each kind.
    pub report: TakeoverReport,
    /// From the command to the last flow's first packet, ns.
    pub duration: Nanos,
}

/// Everything the thread works with.
pub struct Engine {
    /// The flows.
    pub flows: Flows,
    /// UDP that waits for its answer.
    pub datagrams: Datagrams,
    /// The sync channel and the ACK gate, with `protect: sync`.
    pub link: Option<Link>,
    /// What they do.
    pub effects: KernelEffects,
    /// Where mirrored frames come from.
    pub source: FrameSource,
    /// Mirrored frames.
    pub frames: RingBuf<MapData>,
    /// When they do not wake the thread.
    pub rest: Rest,
    /// FIN and RST that the gate held.
    pub held: RingBuf<MapData>,
    /// Flows that lost a copy.
    pub lost: LostFlows,
    /// What is the peer's to answer after a handover.
    pub relay: Relay,
    /// Sends that.
    pub lan: PacketSocket,
    /// Commands of the heartbeat thread.
    pub inbox: Inbox,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What others may see.
    pub shared: Arc<Shared>,
    /// Live flows that were reset, as far as they are counted.
    pub gave_up: u64,
    /// Told of each takeover.
    pub took_over: tokio::sync::mpsc::UnboundedSender<FlowsTookOver>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("flows", &self.flows)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Runs until stopped.
    pub fn run(mut self) {
        let (mut next_look, mut next_census) = (0, 0);
        let mut caught_up = false;
        loop {
            let mut more = self.take_frames(BATCH, Nanos::MAX);
            caught_up |= !more;
            loop {
                match self.inbox.next() {
                    Ok(Command::GoLive { at }) => {
                        self.go_live(at);
                        (next_look, next_census) = (0, 0);
                    }
                    Ok(Command::GoStandby) => {
                        self.flows.go_standby(&mut self.effects);
                        self.effects.warmer.forget();
                        self.datagrams.go_standby();
                        if let Some(link) = &mut self.link {
                            link.go_standby();
                        }
                        (next_look, next_census) = (0, 0);
                    }
                    Ok(Command::HandOver) => self.relay.begin(),
                    Ok(Command::TakeBack) => self.relay.close(),
                    Ok(Command::HandedOver { to }) => {
                        let now = sys::monotonic();
                        self.relay.open(to, now, |frame| send_on(&self.lan, frame));
                    }
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return,
                    Err(TryRecvError::Empty) => break,
                }
            }
            self.take_held();
            let now = sys::monotonic();
            let due = now >= self.flows.next_wakeup();
            if due {
                self.flows.poll(now, &mut self.effects);
                self.flows.adopt_some(now, &mut self.effects, |numbers| {
                    if let Some(link) = &mut self.link {
                        link.adopt(numbers, now);
                    }
                });
            }
            self.effects.settle();
            if due {
                // A turn may follow a turn without a pause: whoever waits for this CPU comes between them, not at the
                // scheduler's next tick.
                std::thread::yield_now();
            }
            if let Some(link) = &mut self.link {
                more |= link.run(&mut self.flows, &mut self.effects, &self.shared, now);
            }
            // One wake-up for all that nobody waits for.
            if now >= next_look {
                next_look = now + LOOK_INTERVAL;
                self.take_lost();
                if let Some(link) = &mut self.link {
                    let copies = match self.source {
                        FrameSource::Mirror(ifindex) => self.shared.peer_tap().zip(Some(ifindex)),
                        FrameSource::Lan => None,
                    };
                    let (flows, effects) = (&mut self.flows, &mut self.effects);
                    link.promise(flows, effects, copies, caught_up, now);
                    caught_up = false;
                }
                if now >= next_census {
                    let took = self.count(now);
                    next_census = now + took * CENSUS_SHARE;
                }
            }
            if !more {
                // What was released since.
                self.effects.settle();
                let link = self.link.as_ref().map_or(Nanos::MAX, Link::next_wakeup);
                let until = self.flows.next_wakeup().min(next_look);
                // What is sent on, and what live shadows answer, clients wait for.
                let now = sys::monotonic();
                let may_rest = !self.flows.is_live() && !self.relay.is_open(now);
                let rest = self.rest.begin(may_rest, now);
                self.wait(until.min(link).min(rest));
            }
        }
    }

    /// Takes up to `most` frames that arrived until `until`; returns whether there may be more.
    fn take_frames(&mut self, most: usize, until: Nanos) -> bool {
        for _ in 0..most {
            let Some(entry) = self.frames.next() else {
                return false;
            };
            let Some((header, frame)) = FrameHeader::split(&entry) else {
                continue;
            };
            // The kernel became standby's behind a handover of which this thread has still to hear.
            if header.state == State::Standby as u16
                && self.flows.is_live()
                && self.inbox.has_hand_over()
            {
                self.relay.begin();
            }
            let relayed = self
                .relay
                .process(&header, frame, self.shared.peer_tap(), |frame| {
                    send_on(&self.lan, frame)
                });
            if let Some(result) = relayed {
                drop(entry);
                self.metrics.frames.inc(result);
                continue;
            }
            self.rest.note(header.len);
            let result = classify(&header, frame, self.source, self.shared.peer_tap()).map(
                |(direction, packet)| {
                    let arrival = header.arrival_ns;
                    if datagrams::is_udp(packet) {
                        return self.datagrams.process_frame(packet, direction, arrival);
                    }
                    let (flows, fx) = (&mut self.flows, &mut self.effects);
                    let result = if header.flags & frame_flags::ANSWERED != 0 {
                        flows.process_answered(packet, arrival, fx)
                    } else {
                        flows.process_frame(packet, direction, arrival, fx)
                    };
                    let late = result == FrameResult::UnknownFlow
                        && header.state == State::Active as u16
                        && self.effects.pass_on_if_adopted(packet);
                    if late { FrameResult::PassedOn } else { result }
                },
            );
            if result.is_err() && header.flags & frame_flags::ANSWERED != 0 {
                let packet = frame.get(usize::from(header.l3_offset)..);
                self.flows.disclaim(packet.unwrap_or_default());
            }
            drop(entry);
            self.metrics
                .frames
                .inc(result.unwrap_or_else(std::convert::identity));
            if header.arrival_ns > until {
                return false;
            }
        }
        true
    }

    fn go_live(&mut self, at: Nanos) {
        self.relay.close();
        // Before any command that follows: a state that comes later than this ends the epoch.
        self.effects.epoch.borrow_and_update();
        // What was mirrored before the kernel took over belongs to the standby.
        while self.take_frames(BATCH, at) {}
        self.take_lost();
        if let (Some(link), Some(at)) = (&self.link, self.shared.peer_lived_until())
            && link.exchange.was_deaf(at)
        {
            self.flows.expose();
        }
        let mut report = self.flows.go_live(sys::monotonic(), &mut self.effects);
        // Before the kernel answers what waited.
        self.effects.settle();
        let unanswered = std::mem::take(&mut report.unanswered);
        for &(reason, count) in &report.resets {
            self.metrics.flow_resets.add(reason, count as u64);
        }
        let _ = self.took_over.send(FlowsTookOver {
            report,
            duration: sys::monotonic().saturating_sub(at),
        });
        self.datagrams
            .go_live(sys::monotonic(), |packet| self.effects.send(packet));
        if let Some(link) = &mut self.link {
            link.go_active(&self.shared, sys::monotonic());
        }
        for syn in unanswered {
            if let Some(link) = &mut self.link {
                link.note_syn(&syn, sys::monotonic());
            }
            self.effects.pass_on(&syn);
        }
    }

    fn take_held(&mut self) {
        while let Some(entry) = self.held.next() {
            let Some(held) = HeldEvent::parse(&entry) else {
                continue;
            };
            drop(entry);
            if self.link.as_mut().is_some_and(|link| link.doubts(&held)) {
                self.metrics.held_doubted.inc();
            } else if self.flows.process_held(&held, &mut self.effects) {
                self.metrics.held_released.inc();
            }
        }
    }

    fn take_lost(&mut self) {
        match self.lost.drain() {
            Ok(lost) => {
                for (flow, at) in lost {
                    self.flows.mark_lost(flow, at);
                }
            }
            Err(error) => tracing::warn!(%error, "cannot read which flows lost a copy"),
        }
    }

    /// Counts the flows and shows the count; returns how long that took, ns.
    fn count(&mut self, started: Nanos) -> Nanos {
        let mut census = self.flows.census();
        let guard = self.link.as_ref().map(|link| &link.exchange.guard);
        census.unprotected += self
            .effects
            .open
            .count(|flow| guard.is_none_or(|guard| !guard.guards(flow)));
        self.shared.set_census(census);
        let metrics = &self.metrics;
        for (condition, count) in [
            (FlowCondition::Handshake, census.handshake),
            (FlowCondition::Lockstep, census.lockstep),
            (FlowCondition::Lagging, census.lagging),
            (FlowCondition::Diverged, census.diverged),
            (FlowCondition::Unprotected, census.unprotected),
            (FlowCondition::Live, census.live),
        ] {
            metrics.flows.set(condition, count as f64);
        }
        metrics.shadow_lag.set(census.lag_bytes as i64);
        metrics.shadow_bytes.set(census.bytes as i64);
        metrics
            .flow_resets
            .add(ResetReason::Lagging, self.flows.gave_up() - self.gave_up);
        self.gave_up = self.flows.gave_up();
        let refused = self.flows.refused();
        metrics
            .flows_refused
            .inc_by(refused.saturating_sub(metrics.flows_refused.get()));
        if let Some(link) = &mut self.link {
            link.count();
        }
        sys::monotonic().saturating_sub(started)
    }

    fn wait(&self, until: Nanos) {
        let pause = Duration::from_nanos(until.saturating_sub(sys::monotonic()));
        let own = [
            self.frames.as_fd(),
            self.held.as_fd(),
            self.inbox.wake.as_fd(),
        ];
        // The link's, or one of the own twice.
        let link = self.link.as_ref().map_or([own[2]; 3], Link::fds);
        let [a, b, c] = own;
        let [d, e, f] = link;
        let mut fds = [a, b, c, d, e, f].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        // Interrupted or not, the loop looks at everything again.
        let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(pause)), None);
        let _ = self.inbox.wake.read();
        if let Some(link) = &self.link
            && fds[5].any().unwrap_or(true)
        {
            link.snapshots.calm();
        }
    }
}

/// Not sent is as good as lost: the client repeats it.
fn send_on(lan: &PacketSocket, frame: &[u8]) {
    let _ = lan.send(frame);
}

/// Where a standby's frames come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameSource {
    /// The LAN brings them from clients and active alike.
    Lan,
    /// The active sends copies of them, which come in on the interface with this index.
    Mirror(u32),
}

/// Direction and IPv4 packet of a frame, or why it is of no use. `peer` is the hardware address of the
/// peer's tap, which its heartbeats authenticate.
///
/// What comes from the VIP must come from there: else anybody on the LAN could tell the shadows what the
/// active said. So must copies in both directions: a bridge floods what it has not yet learnt, and what
/// a client sends is not what the active got. Frames of live flows come from clients.
fn classify<'a>(
    header: &FrameHeader,
    frame: &'a [u8],
    source: FrameSource,
    peer: Option<MacAddr>,
) -> Result<(Direction, &'a [u8]), FrameResult> {
    const IPV4: [u8; 2] = [0x08, 0x00];
    let l3 = header.l3_offset as usize;
    let ethertype = l3.checked_sub(2).and_then(|at| frame.get(at..l3));
    if ethertype != Some(&IPV4) {
        return Err(FrameResult::NotTcp);
    }
    let packet = frame.get(l3..).ok_or(FrameResult::Malformed)?;
    let direction = if header.direction == Direction::ToVip as u16 {
        Direction::ToVip
    } else {
        Direction::FromVip
    };
    let from_peer = || peer.is_some_and(|mac| frame.get(6..12) == Some(&mac[..]));
    let of_live_flow = header.state == State::Active as u16;
    let expected = match source {
        FrameSource::Mirror(ifindex) if !of_live_flow => header.ifindex == ifindex && from_peer(),
        _ => direction == Direction::ToVip || from_peer(),
    };
    if expected {
        Ok((direction, packet))
    } else {
        Err(FrameResult::Foreign)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: MacAddr = [2, 0, 0, 0, 0, 1];
    const CLIENT: MacAddr = [2, 0, 0, 0, 0, 50];
    const TAP: u32 = 7;

    /// Whether a frame is taken for the shadows.
    fn taken(
        source: FrameSource,
        state: State,
        direction: Direction,
        sender: MacAddr,
        ifindex: u32,
    ) -> bool {
        let mut frame = [0; 60];
        frame[6..12].copy_from_slice(&sender);
        frame[12] = 8;
        let header = FrameHeader {
            arrival_ns: 1,
            len: 60,
            ifindex,
            direction: direction as u16,
            state: state as u16,
            l3_offset: 14,
            flags: 0,
        };
        assert_eq!(
            classify(&header, &frame, source, None).is_ok(),
            direction == Direction::ToVip && (source == FrameSource::Lan || state == State::Active),
            "while no peer is known"
        );
        match classify(&header, &frame, source, Some(PEER)) {
            Ok(found) => {
                assert_eq!(found, (direction, &frame[14..]));
                true
            }
            Err(result) => {
                assert_eq!(result, FrameResult::Foreign);
                false
            }
        }
    }

    #[test]
    fn a_standby_with_a_mirror_takes_only_copies_by_the_peer_on_its_tap() {
        let source = FrameSource::Mirror(TAP);
        for direction in [Direction::ToVip, Direction::FromVip] {
            for state in State::ALL
                .into_iter()
                .filter(|state| *state != State::Active)
            {
                assert!(taken(source, state, direction, PEER, TAP));
                assert!(!taken(source, state, direction, CLIENT, TAP));
                assert!(!taken(source, state, direction, PEER, TAP + 1));
            }
        }
    }

    #[test]
    fn on_the_lan_anybody_may_speak_to_the_virtual_ip_and_only_the_peer_for_it() {
        let lan = FrameSource::Lan;
        assert!(taken(lan, State::Standby, Direction::ToVip, CLIENT, 1));
        assert!(taken(lan, State::Standby, Direction::FromVip, PEER, 1));
        assert!(!taken(lan, State::Standby, Direction::FromVip, CLIENT, 1));
    }

    #[test]
    fn frames_of_live_flows_come_from_clients_with_either_tap() {
        for source in [FrameSource::Lan, FrameSource::Mirror(TAP)] {
            assert!(taken(source, State::Active, Direction::ToVip, CLIENT, 1));
            assert!(!taken(source, State::Active, Direction::FromVip, CLIENT, 1));
        }
    }
}
