//! Labels with a fixed set of values.

use rfsis_common::ack_gate::AckGateVerdict;
use rfsis_common::maps::State;
use rfsis_common::mirror::MirrorVerdict;
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

use crate::bpf::XdpMode;
use crate::heartbeat::HeartbeatError;
use crate::heartbeat::session::Refusal;
use crate::segment::SegmentError;
use crate::sync::SyncError;

/// Values of a label, known when the program is built.
pub trait Label: Copy + 'static {
    /// All values; the position of each is its [`Label::index`].
    const ALL: &'static [Self];
    /// Position in [`Label::ALL`].
    fn index(self) -> usize;
    /// The text of the label.
    fn as_str(self) -> &'static str;
}

/// An enum that is a [`Label`], from its variants and their texts.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant),+ }

        impl Label for $name {
            const ALL: &'static [Self] = &[$($name::$variant),+];
            fn index(self) -> usize { self as usize }
            fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }
    };
}

label! {
    /// What became of a heartbeat that was to be sent.
    HeartbeatSent {
        /// On the wire.
        Ok = "ok",
        /// The system refused.
        SendFailed = "send_failed",
        /// Not sent: the agent had slept for longer than a lease since it was made.
        Stale = "stale",
    }
}

label! {
    /// What a heartbeat that came in was.
    HeartbeatReceived {
        /// Authentic and new.
        Ok = "ok",
        /// Its MAC is wrong.
        BadMac = "bad_mac",
        /// Not newer than one already seen.
        Stale = "stale",
        /// Of another cluster.
        WrongCluster = "wrong_cluster",
        /// Ends before its trailer does.
        Truncated = "truncated",
        /// Contradicts itself or the layout.
        Malformed = "malformed",
        /// Carries this node's own id.
        OwnId = "own_id",
        /// Of a node that the config does not name.
        UnknownNode = "unknown_node",
        /// Of a session that has not yet shown to be alive.
        Unproven = "unproven",
        /// Found its ring full.
        Lost = "lost",
    }
}

label! {
    /// What became of a sync datagram that was to be sent.
    SyncSent {
        /// On the wire.
        Ok = "ok",
        /// The system refused.
        SendFailed = "send_failed",
        /// A confirmation that the programs gave by themselves.
        ByKernel = "by_kernel",
    }
}

label! {
    /// What a sync datagram that came in was.
    SyncReceived {
        /// Authentic and new.
        Ok = "ok",
        /// Too short to be one.
        Truncated = "truncated",
        /// Contradicts the layout.
        Malformed = "malformed",
        /// Of another cluster.
        WrongCluster = "wrong_cluster",
        /// Its MAC is wrong.
        BadMac = "bad_mac",
        /// Sent by this node itself.
        OwnId = "own_id",
        /// Not of the peer.
        UnknownNode = "unknown_node",
        /// Between other sessions than the present ones.
        WrongSession = "wrong_session",
        /// Of another epoch than this node's.
        WrongEpoch = "wrong_epoch",
        /// Seen before, or too old to tell.
        Stale = "stale",
    }
}

label! {
    /// What this node can promise its clients.
    Protection {
        /// Every byte that a client is told of is on the standby.
        Sync = "sync",
        /// It should be so, but no standby answers: the gate is open.
        Degraded = "degraded",
        /// Configured so: what the standby lacks at a takeover is lost.
        Async = "async",
        /// Nothing: it does not speak for the VIP.
        Standby = "standby",
    }
}

label! {
    /// How the ACK gate treats a flow.
    GuardCondition {
        /// Its SYN-ACK waits for the standby.
        Opening = "opening",
        /// Its client is told of nothing that the standby lacks.
        Guarded = "guarded",
        /// Its client was told of more, while no standby answered.
        Exposed = "exposed",
    }
}

label! {
    /// How the late join of a flow ended.
    JoinResult {
        /// The standby has a shadow of it.
        Joined = "joined",
        /// The standby did not take it: a bound, or a service that it cannot compute.
        Declined = "declined",
        /// Several times it came to nothing.
        Failed = "failed",
    }
}

label! {
    /// The condition of a flow.
    FlowCondition {
        /// Not established yet.
        Handshake = "handshake",
        /// The shadow holds all that the active acknowledged.
        Lockstep = "lockstep",
        /// The shadow lacks bytes.
        Lagging = "lagging",
        /// The shadow's bytes differ from what the active sent.
        Diverged = "diverged",
        /// Without a shadow, or adopted by the kernel and not guarded since.
        Unprotected = "unprotected",
        /// Carried by the shadow since a takeover.
        Live = "live",
    }
}

label! {
    /// Why a flow was reset.
    ResetReason {
        /// The shadow lacked bytes.
        Lagging = "lagging",
        /// The shadow's bytes differed.
        Diverged = "diverged",
        /// There was no shadow.
        Unprotected = "unprotected",
        /// Its handler's output cannot be computed on two nodes.
        Unpredictable = "unpredictable",
    }
}

label! {
    /// What became of a live shadow that the kernel was to adopt.
    AdoptionResult {
        /// It is a kernel socket.
        Adopted = "adopted",
        /// The kernel refused; it goes on as it is.
        Failed = "failed",
    }
}

label! {
    /// What a mirrored frame was, to the shadows.
    FrameResult {
        /// Fed to its shadow.
        Ok = "ok",
        /// A checksum is wrong.
        BadChecksum = "bad_checksum",
        /// Contradicts itself.
        Malformed = "malformed",
        /// Neither TCP nor UDP to be kept: another protocol, a fragment, or UDP with `udp_replay` off.
        NotTcp = "not_tcp",
        /// To or from a UDP service.
        Datagram = "datagram",
        /// Not from the active node: with tap `mirror` the standby takes only its copies, with `lan`
        /// nobody else may speak for the VIP.
        Foreign = "foreign",
        /// Of a flow that has no shadow.
        UnknownFlow = "unknown_flow",
        /// Of a flow that has become a kernel socket meanwhile: handed to the kernel.
        PassedOn = "passed_on",
        /// The active's own output.
        FromActive = "from_active",
        /// To a port that no service has.
        Outside = "outside",
        /// Came to a node that hands the VIP over, or just has: kept for the peer, or sent on to it.
        Relayed = "relayed",
    }
}

label! {
    /// A ring between kernel and agent.
    Ring {
        /// Mirrored frames.
        Frames = "frames",
        /// Heartbeats.
        Heartbeats = "heartbeats",
    }
}

label! {
    /// What became of a UDP datagram.
    DatagramResult {
        /// The handler's answer was sent.
        Answered = "answered",
        /// There was no answer, or it could not be sent.
        Ignored = "ignored",
        /// Came from where an answer would only be answered again.
        Loop = "loop",
    }
}

label! {
    /// What became of a UDP datagram whose answer by the active was not seen.
    ReplayResult {
        /// Answered after the takeover.
        Answered = "answered",
        /// Waited for longer than `udp_replay`.
        Expired = "expired",
        /// Gave way to newer ones at a bound.
        Dropped = "dropped",
    }
}

impl Label for XdpMode {
    const ALL: &'static [Self] = &XdpMode::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.as_str()
    }
}

impl From<HeartbeatError> for HeartbeatReceived {
    fn from(error: HeartbeatError) -> Self {
        match error {
            HeartbeatError::Truncated { .. } => Self::Truncated,
            HeartbeatError::Malformed { .. } | HeartbeatError::UnknownVersion { .. } => {
                Self::Malformed
            }
            HeartbeatError::WrongCluster { .. } => Self::WrongCluster,
            HeartbeatError::BadMac => Self::BadMac,
        }
    }
}

impl From<Refusal> for HeartbeatReceived {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::OwnId(_) => Self::OwnId,
            Refusal::UnknownNode(_) => Self::UnknownNode,
            Refusal::Stale => Self::Stale,
            Refusal::Unproven => Self::Unproven,
        }
    }
}

impl From<SyncError> for SyncReceived {
    fn from(error: SyncError) -> Self {
        match error {
            SyncError::Truncated { .. } => Self::Truncated,
            SyncError::Malformed { .. } | SyncError::UnknownVersion { .. } => Self::Malformed,
            SyncError::WrongCluster { .. } => Self::WrongCluster,
            SyncError::BadMac => Self::BadMac,
            SyncError::OwnId => Self::OwnId,
            SyncError::UnknownNode { .. } => Self::UnknownNode,
            SyncError::WrongSession => Self::WrongSession,
            SyncError::WrongEpoch { .. } => Self::WrongEpoch,
            SyncError::Stale => Self::Stale,
        }
    }
}

impl From<SegmentError> for FrameResult {
    fn from(error: SegmentError) -> Self {
        match error {
            SegmentError::Malformed => Self::Malformed,
            SegmentError::NotTcp => Self::NotTcp,
            SegmentError::BadChecksum => Self::BadChecksum,
        }
    }
}

impl Label for State {
    const ALL: &'static [Self] = &State::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.as_str()
    }
}

impl Label for XdpVerdict {
    const ALL: &'static [Self] = &XdpVerdict::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.as_str()
    }
}

impl Label for MirrorVerdict {
    const ALL: &'static [Self] = &MirrorVerdict::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.as_str()
    }
}

impl Label for GateVerdict {
    const ALL: &'static [Self] = &GateVerdict::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.as_str()
    }
}

impl Label for AckGateVerdict {
    const ALL: &'static [Self] = &AckGateVerdict::ALL;
    fn index(self) -> usize {
        self as usize
    }
    fn as_str(self) -> &'static str {
        self.as_str()
    }
}
