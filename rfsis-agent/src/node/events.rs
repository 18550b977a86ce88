//! What goes into a [`Node`](super::Node) and what comes out, and all that it can say in a log.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use rfsis_common::maps::State;

use crate::cli::Role;
use crate::heartbeat::session::Refusal;
use crate::heartbeat::wish::{Objection, Wish};
use crate::heartbeat::{Heartbeat, MacAddr, Nanos};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A heartbeat whose MAC is valid.
    Heartbeat {
        /// What it says.
        heartbeat: Heartbeat,
        /// When the kernel got it.
        arrival: Nanos,
    },
    /// Time passed. `now` is read first, *then* the heartbeat ring is drained and fed, then comes
    /// the tick: so a tick knows of every heartbeat that arrived before its `now`.
    Tick,
    /// An [`Action::SendHeartbeat`] was given to the kernel. `now` is read *after* that, afresh,
    /// and the event is handled before the next action: the lease depends on it.
    HeartbeatSent {
        /// Its sequence.
        sequence: u64,
    },
    /// The last [`Action::SendHeartbeat`] failed; or no frame can leave at all.
    LinkSendFailed,
    /// The interface has carrier now, or none. Before the first, it counts as there.
    Carrier(bool),
    /// What [`Action::TakeOver`] asks for is done.
    TakeoverDone,
    /// Hand the VIP over to the standby. Answered by [`Fact::HandingOver`] or [`Fact::NotHandedOver`], and
    /// in the end by [`Action::Yield`] or [`Fact::Resumed`].
    HandOver,
    /// Ask the active for the VIP from now on, or no longer. [`Fact::Refused`] ends it, and a takeover.
    Wish(Wish),
    /// The answer to [`Action::Wished`], where the VIP is not handed over.
    Object(Objection),
    /// So many flows would be lost by a takeover of the standby: the peer is told.
    AtRisk(u32),
    /// The agent ends: silent from now on.
    Stop,
}

/// What is to be done, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this, then report [`Event::HeartbeatSent`] or [`Event::LinkSendFailed`].
    SendHeartbeat {
        /// What to say.
        heartbeat: Heartbeat,
        /// The peer's hardware address, `None` for broadcast.
        to: Option<MacAddr>,
    },
    /// Write the kernel's state: one write of both values. The gate and XDP obey it at once.
    SetState {
        /// State for the kernel.
        state: State,
        /// Epoch, for logs and metrics; the kernel has no use for it.
        epoch: u64,
        /// The gate closes by itself past this.
        lease_until: Nanos,
    },
    /// Write the kernel's lease, the state stays active.
    RenewLease {
        /// The gate closes by itself past this.
        until: Nanos,
    },
    /// The gate has just been opened: shadows go live. Report [`Event::TakeoverDone`].
    TakeOver {
        /// Why.
        reason: TakeoverReason,
        /// The new epoch.
        epoch: u64,
        /// Time since the peer was last heard, `None` if it never was.
        peer_silent_for: Option<Duration>,
    },
    /// Start the sequence of gratuitous ARP; a running sequence starts anew.
    Announce,
    /// Was active or fenced and is standby now: abort the kernel's connections of the VIP.
    Yield {
        /// Why.
        reason: YieldReason,
    },
    /// The standby asks for the VIP. Give it [`Event::HandOver`], or answer by [`Event::Object`].
    Wished(Wish),
    /// Count the heartbeat just handled; see [`HeartbeatResult::as_str`].
    Count(HeartbeatResult),
    /// Log it.
    Report(Fact),
}

/// What became of a heartbeat whose MAC was valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeartbeatResult {
    /// It counts: the peer was heard.
    Accepted,
    /// It does not.
    Refused(Refusal),
}

impl HeartbeatResult {
    /// Value of the metrics label `result`.
    pub const fn as_str(self) -> &'static str {
        match self {
            HeartbeatResult::Accepted => "accepted",
            HeartbeatResult::Refused(refusal) => refusal.as_str(),
        }
    }
}

/// Why a node became active.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TakeoverReason {
    /// The active peer fell silent.
    HeartbeatTimeout,
    /// Nobody was active when the node started.
    Startup,
    /// The node was fenced, and the peer is silent.
    PeerSilent,
    /// The active handed over.
    Switchover,
    /// The VIP was offered to the peer, which did not take it: all goes on as before. Never the reason of
    /// an [`Action::TakeOver`].
    Unanswered,
}

impl TakeoverReason {
    /// The reasons that make a takeover a failover.
    pub const FAILOVERS: [TakeoverReason; 3] = [
        TakeoverReason::HeartbeatTimeout,
        TakeoverReason::PeerSilent,
        TakeoverReason::Switchover,
    ];

    /// Value of the metrics label `reason`.
    pub const fn as_str(self) -> &'static str {
        match self {
            TakeoverReason::HeartbeatTimeout => "heartbeat_timeout",
            TakeoverReason::Startup => "startup",
            TakeoverReason::PeerSilent => "peer_silent",
            TakeoverReason::Switchover => "switchover",
            TakeoverReason::Unanswered => "unanswered",
        }
    }
}

/// Why a node gave the VIP up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum YieldReason {
    /// Both were active, and the peer's epoch is higher, or its address at the same epoch.
    Outranked,
    /// The peer took over while this node was fenced, or may have.
    PeerActive,
    /// Both are fenced, and the peer outranks this node.
    BothFenced,
    /// The peer has taken what it was offered.
    HandedOver,
}

impl YieldReason {
    /// The word used in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            YieldReason::Outranked => "outranked",
            YieldReason::PeerActive => "peer_active",
            YieldReason::BothFenced => "both_fenced",
            YieldReason::HandedOver => "handed_over",
        }
    }
}

/// All that the state machine has to say in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The peer was heard for the first time, or again.
    PeerUp {
        /// The peer.
        peer: Ipv4Addr,
        /// Its role.
        role: Role,
        /// Its state.
        state: State,
        /// Its epoch.
        epoch: u64,
    },
    /// The peer's agent was started anew.
    PeerRestarted(Ipv4Addr),
    /// The peer says another state.
    PeerState {
        /// What it said before.
        from: State,
        /// What it says now.
        to: State,
        /// Its epoch.
        epoch: u64,
    },
    /// Nothing was heard of the peer for the takeover time.
    PeerDown {
        /// The peer.
        peer: Ipv4Addr,
        /// Time since it was last heard.
        silent_for: Duration,
    },
    /// A wrong set-up: another host has our address, or is a third node.
    Misconfigured(Refusal),
    /// Wants to become active, and tells the peer first.
    Claiming(TakeoverReason, u64),
    /// Gave up the claim, because the peer speaks.
    ClaimWithdrawn,
    /// The gate is open.
    TookOver(TakeoverReason, u64),
    /// Takeover is complete.
    NowActive(u64),
    /// The peer says that it is active too, and is outranked.
    DoubleActive {
        /// Our epoch.
        own: u64,
        /// The peer's.
        peer: u64,
    },
    /// The peer yielded.
    DoubleActiveEnded,
    /// The interface has carrier again, or none any more.
    Carrier(bool),
    /// The lease ran out: the agent did not run for so long, or nothing that it sent could leave.
    Fenced {
        /// How long ago.
        lapsed_for: Duration,
        /// Whether the interface has carrier.
        carrier: bool,
    },
    /// The peer had not taken over.
    Resumed {
        /// How long the gate was closed.
        closed_for: Duration,
    },
    /// The gate is closed, and the standby is offered the VIP.
    HandingOver(u64),
    /// It is not.
    NotHandedOver(Objection),
    /// The active does not hand over what this node asked for.
    Refused {
        /// Why.
        objection: Objection,
        /// Flows that would be lost.
        flows: u32,
    },
    /// Is standby now.
    Yielded(YieldReason, u64),
    /// The agent ends.
    Stopped,
}

impl Fact {
    /// How loud.
    pub const fn level(&self) -> tracing::Level {
        match self {
            Fact::Misconfigured(_) => tracing::Level::ERROR,
            Fact::Yielded(YieldReason::HandedOver, _) => tracing::Level::INFO,
            Fact::PeerDown { .. }
            | Fact::DoubleActive { .. }
            | Fact::Carrier(false)
            | Fact::Fenced { .. }
            | Fact::NotHandedOver(_)
            | Fact::Refused { .. }
            | Fact::Yielded(..) => tracing::Level::WARN,
            _ => tracing::Level::INFO,
        }
    }
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fact::PeerUp {
                peer,
                role,
                state,
                epoch,
            } => write!(
                f,
                "peer {peer} is up: {}, {}, epoch {epoch}",
                role.as_str(),
                state.as_str()
            ),
            Fact::PeerRestarted(peer) => write!(f, "peer {peer} has started its agent anew"),
            Fact::PeerState { from, to, epoch } => write!(
                f,
                "peer was {} and is {}, epoch {epoch}",
                from.as_str(),
                to.as_str()
            ),
            Fact::PeerDown { peer, silent_for } => {
                write!(f, "peer {peer} is down: silent for {silent_for:?}")
            }
            Fact::Misconfigured(refusal) => write!(f, "{refusal}"),
            Fact::Claiming(reason, epoch) => write!(
                f,
                "claiming the VIP with epoch {epoch}, reason {}",
                reason.as_str()
            ),
            Fact::ClaimWithdrawn => write!(f, "claim withdrawn: the peer speaks for the VIP"),
            Fact::TookOver(reason, epoch) => write!(
                f,
                "took over with epoch {epoch}, reason {}: the gate is open",
                reason.as_str()
            ),
            Fact::NowActive(epoch) => write!(f, "active, epoch {epoch}: takeover is complete"),
            Fact::DoubleActive { own, peer } => write!(
                f,
                "both nodes are active, epoch {own} here and {peer} there: the peer must yield; was the LAN cut?"
            ),
            Fact::DoubleActiveEnded => write!(f, "the peer yielded: one node is active"),
            Fact::Carrier(true) => write!(f, "the interface has carrier"),
            Fact::Carrier(false) => write!(
                f,
                "the interface has no carrier: this node hears nobody, and does not take over"
            ),
            Fact::Fenced {
                lapsed_for,
                carrier: false,
            } => write!(
                f,
                "fenced: without carrier nobody hears this node, and its lease ran out {lapsed_for:?} ago"
            ),
            Fact::Fenced { lapsed_for, .. } => write!(
                f,
                "fenced: this agent did not run, and its lease ran out {lapsed_for:?} ago; is the host overloaded?"
            ),
            Fact::Resumed { closed_for } => write!(
                f,
                "active again: the peer had not taken over; the gate was closed for {closed_for:?}"
            ),
            Fact::HandingOver(epoch) => {
                write!(f, "handing the VIP over, epoch {epoch}: the gate is closed")
            }
            Fact::NotHandedOver(objection) => {
                write!(f, "the VIP is not handed over: {objection}")
            }
            Fact::Refused { objection, flows } => write!(
                f,
                "the peer does not hand the VIP over: {objection}; {flows} flows at risk"
            ),
            Fact::Yielded(reason, epoch) => write!(
                f,
                "standby: gave the VIP up at epoch {epoch}, reason {}",
                reason.as_str()
            ),
            Fact::Stopped => write!(f, "stopped"),
        }
    }
}
