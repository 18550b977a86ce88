//! An agent's heartbeat thread, as a list of steps: it may be stopped between any two of them, also between a
//! send and the report of it. As [`crate::pulse`], with a model of the kernel.

use rfsis_common::maps::{MirrorPeer, NodeState, State as NodeKind};

use super::*;
use crate::announce::Announcer;
use crate::engine::Command;
use crate::fault::faulty;
use crate::heartbeat::Heartbeat;
use crate::node::{Action, Event, Fact, Node, TakeoverReason, YieldReason};

enum Todo {
    Act(Action),
    Sent(u64),
    TakenOver,
}

/// What the thread shows the others.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shown {
    pub(crate) epoch: u64,
    pub(crate) peer_session: Option<u64>,
    pub(crate) peer_lived_until: Option<Nanos>,
}

/// What one step did that others must hear of.
#[derive(Debug, Default)]
pub(crate) struct Stepped {
    pub(crate) facts: Vec<Fact>,
    pub(crate) took_over: Option<(TakeoverReason, u64)>,
    /// What the kernel of who took over had already.
    pub(crate) goes_on: Vec<FlowKey>,
    pub(crate) yielded: Option<YieldReason>,
    /// Then: what its guard guarded, and the connections that its kernel had.
    pub(crate) last_words: Option<Words>,
    pub(crate) dropped: Vec<FlowKey>,
}

/// The thread.
pub(crate) struct Pulse {
    pub(crate) node: Node,
    pub(crate) ring: VecDeque<(Nanos, Heartbeat)>,
    todo: VecDeque<Todo>,
    /// `now` of the round: read, then drain, then tick.
    round: Option<Nanos>,
    decided: bool,
    pub(crate) announcer: Announcer,
    handing_over: bool,
    /// To be told to hand over.
    pub(crate) hand_over: bool,
    /// What became of the carrier, and was not read yet.
    pub(crate) carrier: VecDeque<bool>,
    pub(crate) commands: VecDeque<Command>,
    pub(crate) shown: Shown,
    last_epoch: u64,
    /// In which epoch it was last to take over, and before that.
    pub(crate) attempted: u64,
    pub(crate) attempted_before: u64,
}

impl Pulse {
    pub(crate) fn new(node: Node) -> Self {
        Self {
            node,
            ring: VecDeque::new(),
            todo: VecDeque::new(),
            round: None,
            decided: false,
            announcer: Announcer::default(),
            handing_over: false,
            hand_over: false,
            carrier: VecDeque::new(),
            commands: VecDeque::new(),
            shown: Shown::default(),
            last_epoch: 0,
            attempted: 0,
            attempted_before: 0,
        }
    }

    /// When there is something to do.
    pub(crate) fn next_wakeup(&self) -> Nanos {
        let busy = self.round.is_some()
            || !self.todo.is_empty()
            || !self.ring.is_empty()
            || self.hand_over
            || !self.carrier.is_empty();
        if busy {
            return 0;
        }
        self.node.next_wakeup().min(self.announcer.next_wakeup())
    }

    /// The next step; `None` if there is nothing to do now.
    pub(crate) fn step(&mut self, kernel: &mut Kernel, now: Nanos) -> Option<Stepped> {
        let mut stepped = Stepped::default();
        match self.todo.pop_front() {
            Some(Todo::Act(action)) => {
                self.act(action, kernel, now, &mut stepped);
                return Some(stepped);
            }
            Some(Todo::Sent(sequence)) => {
                self.feed_first(Event::HeartbeatSent { sequence }, now);
                return Some(stepped);
            }
            Some(Todo::TakenOver) => {
                self.feed_first(Event::TakeoverDone, now);
                return Some(stepped);
            }
            None => {}
        }
        let Some(round) = self.round else {
            if now < self.next_wakeup() {
                return None;
            }
            self.round = Some(now);
            self.decided = false;
            return Some(stepped);
        };
        if let Some(carrier) = self.carrier.pop_front() {
            // The agent may have been stopped since the round began.
            self.feed(Event::Carrier(carrier), now);
            return Some(stepped);
        }
        let skips = faulty!(SkipRing) && now >= self.node.next_wakeup() && !self.decided;
        if !skips && let Some((arrival, heartbeat)) = self.ring.pop_front() {
            self.feed(Event::Heartbeat { heartbeat, arrival }, round.max(arrival));
        } else if !self.decided {
            self.decided = true;
            if std::mem::take(&mut self.hand_over) {
                self.feed(Event::HandOver, round);
            }
            if round >= self.node.next_wakeup() {
                self.feed(Event::Tick, round);
                hold!(
                    NoPanic,
                    self.node.next_wakeup() > round,
                    "a busy loop of the node"
                );
            }
        } else {
            self.round = None;
            if self.announcer.due(now) {
                kernel.out.push(Out::Announce);
            }
            self.update_mirror(kernel, now);
        }
        let epoch = self.node.epoch();
        hold!(
            EpochsGrow,
            epoch >= self.last_epoch,
            "epoch {epoch} after {}",
            self.last_epoch
        );
        self.last_epoch = epoch;
        self.shown = Shown {
            epoch,
            peer_session: self.node.peer_session(),
            peer_lived_until: self.node.peer_lived_until(),
        };
        Some(stepped)
    }

    fn feed(&mut self, event: Event, now: Nanos) {
        let mut actions = Vec::new();
        self.node.handle(event, now, &mut actions);
        self.todo.extend(actions.into_iter().map(Todo::Act));
    }

    /// What the event leads to is done before what was to be done already.
    fn feed_first(&mut self, event: Event, now: Nanos) {
        let mut actions = Vec::new();
        self.node.handle(event, now, &mut actions);
        for action in actions.into_iter().rev() {
            self.todo.push_front(Todo::Act(action));
        }
    }

    fn act(&mut self, action: Action, kernel: &mut Kernel, now: Nanos, stepped: &mut Stepped) {
        match action {
            Action::SetState {
                state, lease_until, ..
            } => {
                if state != NodeKind::Active {
                    self.announcer.stop();
                }
                kernel.state = NodeState {
                    state: state as u64,
                    lease_ns: lease_until,
                };
                match (self.handing_over, state) {
                    (_, NodeKind::HandingOver) => self.commands.push_back(Command::HandOver),
                    (true, NodeKind::Active) => self.commands.push_back(Command::TakeBack),
                    _ => {}
                }
                self.handing_over = state == NodeKind::HandingOver;
            }
            Action::RenewLease { until } => {
                kernel.state = NodeState {
                    state: NodeKind::Active as u64,
                    lease_ns: until,
                };
            }
            Action::SendHeartbeat { heartbeat, .. } if self.node.is_stale(&heartbeat, now) => {}
            Action::SendHeartbeat { heartbeat, .. } => {
                kernel.out.push(Out::Heartbeat(heartbeat));
                self.todo.push_front(Todo::Sent(heartbeat.sequence));
            }
            Action::TakeOver { reason, epoch, .. } => {
                self.attempted_before = std::mem::replace(&mut self.attempted, epoch);
                self.shown.epoch = epoch;
                self.commands.push_back(Command::GoLive { at: now });
                stepped.took_over = Some((reason, epoch));
                stepped.goes_on = kernel.connections.keys().copied().collect();
                self.todo.push_back(Todo::TakenOver);
            }
            Action::Announce => {
                self.announcer.start(now);
                self.announcer.due(now);
                kernel.out.push(Out::Announce);
            }
            Action::Yield { reason } => {
                // The services abort their connections, whatever the shadow thread does.
                stepped.dropped = kernel.connections.keys().copied().collect();
                kernel.connections.clear();
                self.commands.push_back(Command::GoStandby);
                stepped.yielded = Some(reason);
            }
            Action::Report(fact) => stepped.facts.push(fact),
            Action::Wished(_) | Action::Count(_) => {}
        }
    }

    /// Copies go to a peer that is standby and heard: nobody else has a use for them.
    fn update_mirror(&self, kernel: &mut Kernel, now: Nanos) {
        let speaks = matches!(
            self.node.state(),
            NodeKind::Active | NodeKind::TakingOver | NodeKind::HandingOver
        );
        kernel.peer = match self.node.peer() {
            Some(peer)
                if speaks && peer.state == NodeKind::Standby && self.node.peer_heard(now) =>
            {
                MirrorPeer::at(peer.tap_mac)
            }
            _ => MirrorPeer::NOBODY,
        };
    }
}
