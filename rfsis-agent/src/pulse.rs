//! The heartbeat thread: feeds the [`Node`] with heartbeats, carrier and time, and does what it says.
//!
//! It has real-time priority where allowed, and waits for nobody: no lock, no log, no disk. What it
//! has to say to the rest of the agent goes through channels and atomics.

use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use rfsis_common::maps::{HeartbeatEvent, MirrorPeer, NodeState, State};
use tokio::sync::{mpsc, watch};

use crate::announce::{self, Announcer};
use crate::bpf::{MirrorWriter, StateWriter};
use crate::carrier::CarrierWatch;
use crate::engine::{Command, EngineHandle};
use crate::heartbeat::wish::Wish;
use crate::heartbeat::{Codec, MacAddr, Nanos};
use crate::metrics::{HeartbeatReceived, HeartbeatSent, Metrics};
use crate::node::{
    Action, Event, Fact, HeartbeatResult, Node, PeerView, TakeoverReason, YieldReason,
};
use crate::shared::{NodeView, PeerGlimpse, Shared};
use crate::sys::{self, PacketSocket};

/// Heartbeats taken from the ring before time is looked at again. A flood of forged frames must not
/// keep the thread from sending.
const BATCH: usize = 1024;

/// Up to this interval the thread does not wake up for a heartbeat.
const SHORT_INTERVAL: Duration = Duration::from_millis(2);

/// A takeover, for the history.
#[derive(Clone, Copy, Debug)]
pub struct Takeover {
    /// Why.
    pub reason: TakeoverReason,
    /// The new epoch.
    pub epoch: u64,
    /// From the noticed deadline to the first frame from the VIP, ns.
    pub duration: Nanos,
}

/// What the thread tells the rest of the agent.
#[derive(Clone, Copy, Debug)]
pub enum Notice {
    /// To be logged.
    Fact(Fact),
    /// To be remembered.
    TookOver(Takeover),
    /// The kernel refused a write of the state: the gate closes when its lease lapses.
    StateNotWritten,
    /// The standby asks for the VIP.
    Wished(Wish),
    /// From now on the active copies the VIP's frames to this peer, or to nobody.
    Mirrors(MirrorPeer),
    /// The kernel refused to be told whom to copy to: it goes on as before.
    MirrorNotWritten,
}

/// Everything the thread works with.
pub struct Pulse {
    /// The state machine.
    pub node: Node,
    /// Writes and reads heartbeats.
    pub codec: Codec,
    /// Between two heartbeats.
    pub interval: Duration,
    /// Address of the peer node.
    pub peer: Ipv4Addr,
    /// The virtual IP.
    pub vip: Ipv4Addr,
    /// Hardware address of the interface.
    pub mac: MacAddr,
    /// Sends heartbeats and announcements.
    pub socket: PacketSocket,
    /// Heartbeats that came in.
    pub ring: RingBuf<MapData>,
    /// What became of the interface's carrier.
    pub carrier: CarrierWatch,
    /// The kernel's state.
    pub state: StateWriter,
    /// Whom the kernel copies to, with tap `mirror`.
    pub mirror: Option<MirrorWriter>,
    /// The shadows.
    pub engine: EngineHandle,
    /// The kernel sockets: `Active` while their connections are this node's.
    pub services: watch::Sender<State>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What others may see.
    pub shared: Arc<Shared>,
    /// What others must hear.
    pub notices: mpsc::UnboundedSender<Notice>,
    /// What it is told to do.
    pub orders: Receiver<Event>,
}

impl std::fmt::Debug for Pulse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pulse")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// Tells the thread what to do, and stops it.
#[derive(Clone, Debug)]
pub struct PulseHandle {
    stop: Arc<AtomicBool>,
    orders: Sender<Event>,
    wake: Arc<EventFd>,
}

impl PulseHandle {
    /// A handle for a thread that is still to be started, and the end of it that the thread has.
    ///
    /// # Errors
    /// Of eventfd(2).
    pub fn new() -> nix::Result<(Self, Receiver<Event>)> {
        let (sender, orders) = channel();
        let handle = Self {
            stop: Arc::new(AtomicBool::new(false)),
            orders: sender,
            wake: Arc::new(EventFd::from_flags(
                EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
            )?),
        };
        Ok((handle, orders))
    }

    /// Gives the node an event. Never waits.
    pub fn order(&self, event: Event) {
        // Both fail only when the thread has ended, and then nobody is to be told.
        let _ = self.orders.send(event);
        let _ = self.wake.write(1);
    }

    /// Asks the thread to close the gate and end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        // Fails only when 2^64 wake-ups are outstanding; then the thread is awake.
        let _ = self.wake.write(1);
    }
}

impl Pulse {
    /// Runs until stopped. The gate is closed when it returns.
    pub fn run(mut self, handle: &PulseHandle) {
        let mut runner = Runner {
            announcer: Announcer::default(),
            published: None,
            mirrors: MirrorPeer::NOBODY,
            decided_at: 0,
            spoke_at: 0,
            took_over: None,
            handing_over: false,
            spare: Vec::new(),
        };
        loop {
            let stopping = handle.stop.load(Ordering::Acquire);
            let now = sys::monotonic();
            while let Some(carrier) = self.carrier.read() {
                self.metrics.carrier.set(carrier.into());
                // Not before it was told, wherever this thread was stopped.
                self.handle(Event::Carrier(carrier), sys::monotonic(), &mut runner);
            }
            self.drain(now, &mut runner);
            while let Ok(order) = self.orders.try_recv() {
                self.handle(order, now, &mut runner);
            }
            let event = if stopping { Event::Stop } else { Event::Tick };
            if stopping || now >= self.node.next_wakeup() {
                runner.decided_at = now;
                self.handle(event, now, &mut runner);
            }
            if stopping {
                return;
            }
            if runner.announcer.due(now) {
                self.announce(&mut runner);
            }
            self.update_mirror(now, &mut runner);
            self.publish(&mut runner);
            let wakeup = self.node.next_wakeup().min(runner.announcer.next_wakeup());
            self.wait(&handle.wake, wakeup);
        }
    }

    /// Feeds what arrived before `now`, and no endless flood of what comes after.
    fn drain(&mut self, now: Nanos, runner: &mut Runner) {
        for _ in 0..BATCH {
            let Some(item) = self.ring.next() else {
                return;
            };
            let Some(entry) = HeartbeatEvent::parse(&item) else {
                continue;
            };
            drop(item);
            let arrival = entry.arrival_ns;
            match self.codec.parse(entry.frame()) {
                Ok(heartbeat) => {
                    self.handle(Event::Heartbeat { heartbeat, arrival }, now, runner);
                }
                Err(error) => self.metrics.heartbeats_received.inc(error.into()),
            }
            if arrival > now {
                return;
            }
        }
    }

    /// Feeds an event to the node, and does what it says.
    fn handle(&mut self, event: Event, now: Nanos, runner: &mut Runner) {
        self.act(event, now, runner);
        if let Some((reason, epoch)) = runner.took_over.take() {
            self.notice(Notice::TookOver(Takeover {
                reason,
                epoch,
                duration: runner.spoke_at.saturating_sub(runner.decided_at),
            }));
            self.act(Event::TakeoverDone, now, runner);
        }
    }

    /// What an action brings about is done before the next action.
    fn act(&mut self, event: Event, now: Nanos, runner: &mut Runner) {
        let mut actions = std::mem::take(&mut runner.spare);
        self.node.handle(event, now, &mut actions);
        for action in actions.drain(..) {
            self.perform(action, now, runner);
        }
        runner.spare = actions;
    }

    fn perform(&mut self, action: Action, now: Nanos, runner: &mut Runner) {
        match action {
            Action::SendHeartbeat { heartbeat, .. }
                if self.node.is_stale(&heartbeat, sys::monotonic()) =>
            {
                self.metrics.heartbeats_sent.inc(HeartbeatSent::Stale);
            }
            Action::SendHeartbeat { heartbeat, to } => {
                let frame = self.codec.emit(&heartbeat, to, self.peer);
                let (result, event) = match self.socket.send(&frame) {
                    Ok(()) => (
                        HeartbeatSent::Ok,
                        Event::HeartbeatSent {
                            sequence: heartbeat.sequence,
                        },
                    ),
                    Err(_) => (HeartbeatSent::SendFailed, Event::LinkSendFailed),
                };
                self.metrics.heartbeats_sent.inc(result);
                self.act(event, sys::monotonic(), runner);
            }
            Action::SetState {
                state, lease_until, ..
            } => {
                if state == State::Active {
                    // The sockets must know before the first client gets through.
                    set_services(&self.services, State::Active);
                } else {
                    runner.announcer.stop();
                }
                self.write_state(state, lease_until);
                match (runner.handing_over, state) {
                    (_, State::HandingOver) => self.engine.send(Command::HandOver),
                    (true, State::Active) => self.engine.send(Command::TakeBack),
                    _ => {}
                }
                runner.handing_over = state == State::HandingOver;
            }
            Action::RenewLease { until } => self.write_state(State::Active, until),
            Action::TakeOver { reason, epoch, .. } => {
                let at = sys::monotonic();
                // The shadows go live in the new epoch.
                self.shared.set_session(epoch, self.node.peer_session());
                self.engine.send(Command::GoLive { at });
                runner.took_over = Some((reason, epoch));
            }
            Action::Announce => {
                runner.announcer.start(now);
                runner.announcer.due(now);
                self.announce(runner);
            }
            Action::Yield { reason } => {
                set_services(&self.services, State::Standby);
                self.engine.send(Command::GoStandby);
                if reason == YieldReason::HandedOver
                    && let Some(peer) = self.node.peer()
                {
                    self.engine.send(Command::HandedOver { to: peer.mac });
                }
            }
            Action::Wished(wish) => self.notice(Notice::Wished(wish)),
            Action::Count(HeartbeatResult::Accepted) => {
                self.metrics.heartbeats_received.inc(HeartbeatReceived::Ok);
            }
            Action::Count(HeartbeatResult::Refused(refusal)) => {
                self.metrics.heartbeats_received.inc(refusal.into());
            }
            Action::Report(fact) => self.notice(Notice::Fact(fact)),
        }
    }

    fn write_state(&self, state: State, lease_ns: Nanos) {
        let value = NodeState {
            state: state as u64,
            lease_ns,
        };
        if self.state.write(value).is_err() {
            self.notice(Notice::StateNotWritten);
        }
    }

    fn announce(&self, runner: &mut Runner) {
        for frame in announce::frames(self.vip, self.mac) {
            // Not sent is as good as lost: it is repeated.
            let _ = self.socket.send(&frame);
        }
        runner.spoke_at = sys::monotonic();
    }

    /// Copies go to a peer that is standby and heard: nobody else has a use for them.
    fn update_mirror(&self, now: Nanos, runner: &mut Runner) {
        let Some(mirror) = &self.mirror else {
            self.shared.set_copying(true);
            return;
        };
        let speaks = matches!(
            self.node.state(),
            State::Active | State::TakingOver | State::HandingOver
        );
        let peer = match self.node.peer() {
            Some(peer) if speaks && self.listens(&peer, now) => MirrorPeer::at(peer.tap_mac),
            _ => MirrorPeer::NOBODY,
        };
        if peer == runner.mirrors {
            return;
        }
        if mirror.write(peer).is_ok() {
            runner.mirrors = peer;
            self.shared.set_copying(!peer.is_nobody());
            self.engine.wake();
            self.notice(Notice::Mirrors(peer));
        } else {
            self.notice(Notice::MirrorNotWritten);
        }
    }

    /// Whether the peer is standby and heard. Where only its heartbeats get lost it still confirms, and goes on
    /// hearing ours: without copies it would confirm nothing new. It speaks there in the epoch of this node,
    /// so if it was active in an older one, it has yielded.
    fn listens(&self, peer: &PeerView, now: Nanos) -> bool {
        let standby = peer.state == State::Standby;
        let yielded = peer.epoch < self.node.epoch();
        let confirms = self.shared.sync_heard_in(self.node.epoch());
        (standby && self.node.peer_heard(now))
            || ((standby || yielded) && confirms.is_some_and(|at| self.node.is_recent(at, now)))
    }

    fn notice(&self, notice: Notice) {
        // The receiver lives as long as the agent; at its end nobody listens.
        let _ = self.notices.send(notice);
    }

    /// Waits for a heartbeat, a wake-up, or the time.
    ///
    /// At short intervals the heartbeats wait for the next tick, which is soon: decisions go by their
    /// arrival times, and half of the wake-ups are saved.
    fn wait(&self, wake: &EventFd, until: Nanos) {
        let timeout = (until != Nanos::MAX).then(|| {
            TimeSpec::from_duration(Duration::from_nanos(until.saturating_sub(sys::monotonic())))
        });
        let mut fds = [
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.carrier.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ring.as_fd(), PollFlags::POLLIN),
        ];
        let watched = if self.interval <= SHORT_INTERVAL {
            2
        } else {
            3
        };
        // Interrupted or not, the loop looks at everything again.
        let _ = ppoll(&mut fds[..watched], timeout, None);
        let _ = wake.read();
    }

    /// Shows the node's state to the other threads. Never waits: what does not get through now does
    /// so on the next round.
    fn publish(&self, runner: &mut Runner) {
        let peer = self.node.peer();
        self.shared
            .set_session(self.node.epoch(), self.node.peer_session());
        if let Some(peer) = peer {
            self.shared.peer_heard(peer.heard_at, peer.tap_mac);
        }
        if let Some(at) = self.node.peer_lived_until() {
            self.shared.set_peer_lived_until(at);
        }
        let view = NodeView {
            state: self.node.state(),
            epoch: self.node.epoch(),
            peer: peer.map(|p| PeerGlimpse {
                state: p.state,
                epoch: p.epoch,
                role: p.role,
                at_risk: p.at_risk,
            }),
        };
        if runner.published != Some(view) && self.shared.try_set_node(view) {
            runner.published = Some(view);
        }
    }
}

/// What the loop remembers.
struct Runner {
    announcer: Announcer,
    published: Option<NodeView>,
    mirrors: MirrorPeer,
    decided_at: Nanos,
    spoke_at: Nanos,
    took_over: Option<(TakeoverReason, u64)>,
    /// The kernel's state is that of a handover.
    handing_over: bool,
    /// Actions, kept so that a heartbeat allocates nothing.
    spare: Vec<Action>,
}

/// Every send ends the connections of an epoch, so only a change is sent.
fn set_services(services: &watch::Sender<State>, state: State) {
    services.send_if_modified(|current| std::mem::replace(current, state) != state);
}
