//! Keys and values of the eBPF maps. All `repr(C)`, without padding that is not named.

/// What a node is now. The number is what stands in the [`NodeState`] map and in a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// Mirrors the VIP's traffic, says nothing for the VIP.
    Standby = 0,
    /// Answers for the VIP.
    Active = 1,
    /// Deadline passed, the map write and the announcement are under way.
    TakingOver = 2,
    /// Was active and found its lease lapsed: silent until it knows what the peer did meanwhile.
    Fenced = 3,
    /// Was active and offers the VIP to the standby: silent until it is taken, or was not.
    HandingOver = 4,
}

impl State {
    /// All states, in the order of their numbers.
    pub const ALL: [State; 5] = [
        State::Standby,
        State::Active,
        State::TakingOver,
        State::Fenced,
        State::HandingOver,
    ];

    /// The state with this number, if there is one.
    pub const fn from_u8(value: u8) -> Option<State> {
        match value {
            0 => Some(State::Standby),
            1 => Some(State::Active),
            2 => Some(State::TakingOver),
            3 => Some(State::Fenced),
            4 => Some(State::HandingOver),
            _ => None,
        }
    }

    /// The word used in logs, metrics and `status`.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Standby => "standby",
            State::Active => "active",
            State::TakingOver => "taking_over",
            State::Fenced => "fenced",
            State::HandingOver => "handing_over",
        }
    }
}

/// The one value of map `STATE`: written by the agent, read by every program per frame.
///
/// A takeover is one write of this value. A reader may see it half-written (array maps copy word by
/// word): the new state with the old lease is a lapsed lease, the old state with the new lease is
/// not active, so both halves read as *closed*. A handover leaves the lease as it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct NodeState {
    /// [`State`] as a number; anything unknown reads as standby.
    pub state: u64,
    /// Past this `bpf_ktime_get_ns` (CLOCK_MONOTONIC, ns) the gate is closed whatever the state.
    pub lease_ns: u64,
}

/// One connection: the client's end and the service port. The VIP is the same for all.
///
/// Numbers are in host byte order. Key of `LIVE_FLOWS`, `APPROVED_FLOWS`, `LOST_FLOWS` and `GUARDED`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct FlowKey {
    /// IPv4 address of the client.
    pub client_addr: u32,
    /// TCP port of the client.
    pub client_port: u16,
    /// TCP port of the service on the VIP.
    pub service_port: u16,
}

impl FlowKey {
    /// Reads one as it lies in memory.
    pub(crate) fn read(bytes: &[u8], offset: usize) -> Option<FlowKey> {
        Some(FlowKey {
            client_addr: u32_at(bytes, offset)?,
            client_port: u16_at(bytes, offset + 4)?,
            service_port: u16_at(bytes, offset + 6)?,
        })
    }
}

/// The one value of map `MIRROR`: to which hardware address the active copies the VIP's frames.
///
/// One word, so that a program never sees half of it: the address in the low 48 bits, 0 for nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct MirrorPeer(u64);

impl MirrorPeer {
    /// No copies.
    pub const NOBODY: MirrorPeer = MirrorPeer(0);

    /// Copies go to this hardware address; all zeros is nobody's.
    #[inline(always)]
    pub const fn at(mac: [u8; 6]) -> MirrorPeer {
        let [a, b, c, d, e, f] = mac;
        MirrorPeer(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    /// The word from a map or a global.
    #[inline(always)]
    pub const fn from_word(word: u64) -> MirrorPeer {
        MirrorPeer(word)
    }

    /// The hardware address.
    #[inline(always)]
    pub const fn mac(self) -> [u8; 6] {
        let [_, _, a, b, c, d, e, f] = self.0.to_be_bytes();
        [a, b, c, d, e, f]
    }

    /// Whether there is nobody to copy to.
    #[inline(always)]
    pub const fn is_nobody(self) -> bool {
        self.0 == 0
    }

    /// The word as it stands in the map.
    #[inline(always)]
    pub const fn word(self) -> u64 {
        self.0
    }
}

/// Value of map `PROMISE`: what the agent of a standby lets its program say for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Promise {
    /// Until then, ns (CLOCK_MONOTONIC).
    pub until_ns: u64,
    /// Whose copies the agent takes; with nobody's it confirms by itself alone.
    pub from: MirrorPeer,
    /// Index of the interface on which they come in.
    pub ifindex: u64,
}

/// Which way a mirrored frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// Addressed to the VIP.
    ToVip = 0,
    /// Sent from the VIP: by the active node, or by somebody who claims to be it.
    FromVip = 1,
}

/// Header in front of every frame in the ring `FRAMES`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FrameHeader {
    /// Arrival, `bpf_ktime_get_ns` (CLOCK_MONOTONIC, ns).
    pub arrival_ns: u64,
    /// Bytes of the frame that follow, from the Ethernet header on.
    pub len: u32,
    /// Interface that the frame came in on.
    pub ifindex: u32,
    /// [`Direction`] as a number; ARP requests for the VIP count as `ToVip`.
    pub direction: u16,
    /// [`State`] of the node when the frame came in, as a number: on the active only frames of live
    /// flows are mirrored.
    pub state: u16,
    /// Bytes from the start of the frame to the layer-3 header (14, or more behind a VLAN tag 0).
    pub l3_offset: u16,
    /// `frame_flags`.
    pub flags: u16,
}

/// Bits of [`FrameHeader::flags`].
pub mod frame_flags {
    /// The copy of a SYN-ACK that the ACK gate holds, and the program has told the active's that it is here.
    pub const ANSWERED: u16 = 1;
}

/// Bytes of [`FrameHeader`].
pub const FRAME_HEADER_LEN: usize = size_of::<FrameHeader>();

impl FrameHeader {
    /// Splits an entry of the ring into header and frame; what pads the slot is left out. `None` for an
    /// entry that is shorter than it says.
    pub fn split(entry: &[u8]) -> Option<(FrameHeader, &[u8])> {
        let (header, rest) = entry.split_at_checked(FRAME_HEADER_LEN)?;
        let header = FrameHeader {
            arrival_ns: u64_at(header, 0)?,
            len: u32_at(header, 8)?,
            ifindex: u32_at(header, 12)?,
            direction: u16_at(header, 16)?,
            state: u16_at(header, 18)?,
            l3_offset: u16_at(header, 20)?,
            flags: u16_at(header, 22)?,
        };
        Some((header, rest.get(..header.len as usize)?))
    }
}

/// Slot sizes of the ring `FRAMES`, header included, bytes: `RingBuf::reserve` takes constants only.
/// The last holds any GSO super-frame.
pub const FRAME_SLOTS: [usize; 4] = [256, 2048, 9216 + 256, 65536 + 256];

/// Most bytes of a heartbeat frame that are copied; what is longer is cut and so fails its checks.
pub const HEARTBEAT_CAPTURE: usize = 192;

/// An entry of the ring `HEARTBEATS`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct HeartbeatEvent {
    /// Arrival, `bpf_ktime_get_ns` (CLOCK_MONOTONIC, ns).
    pub arrival_ns: u64,
    /// Valid bytes of `frame`.
    pub len: u32,
    /// Interface that the frame came in on.
    pub ifindex: u32,
    /// The frame from the Ethernet header on.
    pub frame: [u8; HEARTBEAT_CAPTURE],
}

impl HeartbeatEvent {
    /// Reads an entry of the ring; `None` for one that is shorter than it says.
    pub fn parse(entry: &[u8]) -> Option<HeartbeatEvent> {
        let (header, rest) = entry.split_at_checked(16)?;
        let event = HeartbeatEvent {
            arrival_ns: u64_at(header, 0)?,
            len: u32_at(header, 8)?,
            ifindex: u32_at(header, 12)?,
            frame: *rest.first_chunk()?,
        };
        (event.len as usize <= HEARTBEAT_CAPTURE).then_some(event)
    }

    /// The valid bytes of the frame.
    pub fn frame(&self) -> &[u8] {
        self.frame.get(..self.len as usize).unwrap_or(&self.frame)
    }
}

/// An entry of the ring `HELD`: the gate held back a FIN or RST that nobody approved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct HeldEvent {
    /// When, `bpf_ktime_get_ns` (CLOCK_MONOTONIC, ns).
    pub at_ns: u64,
    /// The flow.
    pub flow: FlowKey,
    /// TCP sequence number of the held segment.
    pub seq: u32,
    /// TCP acknowledgement number of the held segment.
    pub ack: u32,
    /// TCP flags (RFC 9293 section 3.1), low byte.
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

impl HeldEvent {
    /// Reads an entry of the ring; `None` for a short one.
    pub fn parse(entry: &[u8]) -> Option<HeldEvent> {
        Some(HeldEvent {
            at_ns: u64_at(entry, 0)?,
            flow: FlowKey::read(entry, 8)?,
            seq: u32_at(entry, 16)?,
            ack: u32_at(entry, 20)?,
            flags: u32_at(entry, 24)?,
            reserved: u32_at(entry, 28)?,
        })
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes
        .get(offset..)?
        .first_chunk()
        .copied()
        .map(u16::from_ne_bytes)
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes
        .get(offset..)?
        .first_chunk()
        .copied()
        .map(u32::from_ne_bytes)
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes
        .get(offset..)?
        .first_chunk()
        .copied()
        .map(u64::from_ne_bytes)
}

/// Names of maps and programs, the same on both sides of the kernel boundary.
pub mod names {
    /// XDP program, ingress.
    pub const XDP: &str = "rfsis_xdp";
    /// TC program, ingress: does what [`XDP`] and [`MIRROR_PROGRAM`] do.
    pub const INGRESS: &str = "rfsis_ingress";
    /// `Array<u64>`, one entry: until when the reader of [`FRAMES`] rests, ns; 0 while it does not.
    pub const REST: &str = "REST";
    /// TC program, egress.
    pub const GATE: &str = "rfsis_gate";
    /// TC program, ingress: copies input to the standby.
    pub const MIRROR_PROGRAM: &str = "rfsis_mirror";
    /// `Array<NodeState>`, one entry.
    pub const STATE: &str = "STATE";
    /// `HashMap<FlowKey, u8>`: flows that live on a shadow.
    pub const LIVE_FLOWS: &str = "LIVE_FLOWS";
    /// `LruHashMap<FlowKey, u8>`: flows whose FIN or RST may leave.
    pub const APPROVED_FLOWS: &str = "APPROVED_FLOWS";
    /// `LruHashMap<FlowKey, u64>`: flows that lost a copy to a full ring, with the time, ns.
    pub const LOST_FLOWS: &str = "LOST_FLOWS";
    /// `HashMap<u16, u8>`: TCP ports of the services, whose FIN and RST the gate holds; [`super::PRESENT`]
    /// or [`super::OBSERVED`].
    pub const SERVICE_PORTS: &str = "SERVICE_PORTS";
    /// `HashMap<u16, u8>`: UDP ports of the services, whose ICMP port unreachable the gate holds.
    pub const DATAGRAM_PORTS: &str = "DATAGRAM_PORTS";
    /// `RingBuf` of [`super::HeartbeatEvent`].
    pub const HEARTBEATS: &str = "HEARTBEATS";
    /// `RingBuf` of [`super::FrameHeader`] and frame.
    pub const FRAMES: &str = "FRAMES";
    /// `RingBuf` of [`super::HeldEvent`].
    pub const HELD: &str = "HELD";
    /// `PerCpuArray<u64>` indexed by [`crate::verdict::XdpVerdict`].
    pub const XDP_COUNTERS: &str = "XDP_COUNTERS";
    /// `PerCpuArray<u64>` indexed by [`crate::verdict::GateVerdict`].
    pub const GATE_COUNTERS: &str = "GATE_COUNTERS";
    /// `PerCpuArray<u64>` indexed by [`crate::mirror::MirrorVerdict`].
    pub const MIRROR_COUNTERS: &str = "MIRROR_COUNTERS";
    /// `Array<MirrorPeer>`, one entry.
    pub const MIRROR: &str = "MIRROR";
    /// `Array<u64>`, one entry: 1 while the ACK gate guards, 0 while it is open.
    pub const GUARD: &str = "GUARD";
    /// `HashMap<FlowKey, Guarded>` ([`crate::ack_gate::Guarded`]): flows that the standby knows.
    pub const GUARDED: &str = "GUARDED";
    /// `Array` of [`crate::ack_gate::Confirmation`], by slot, which the agent maps into its memory.
    pub const CONFIRMED: &str = "CONFIRMED";
    /// `Array` of [`crate::ack_gate::Sent`], by slot.
    pub const SENT: &str = "SENT";
    /// `Array` of [`crate::prompt::Delegated`], by slot.
    pub const DELEGATED: &str = "DELEGATED";
    /// `Array<PromptPeer>` ([`crate::prompt::PromptPeer`]), one entry.
    pub const PROMPT: &str = "PROMPT";
    /// `Array` of [`crate::prompt::PromptSeen`], two entries.
    pub const PROMPT_SEEN: &str = "PROMPT_SEEN";
    /// `Array` of [`crate::prompt::Hop`], by slot.
    pub const HOPS: &str = "HOPS";
    /// `Array<AgreePeer>` ([`crate::agree::AgreePeer`]), one entry.
    pub const AGREE: &str = "AGREE";
    /// `Array<Promise>` ([`super::Promise`]), one entry.
    pub const PROMISE: &str = "PROMISE";
    /// `HashMap<FlowKey, Pledged>` ([`crate::pledge::Pledged`]).
    pub const PLEDGED: &str = "PLEDGED";
    /// `Array` of [`crate::pledge::Pledge`], by slot, which the agent maps into its memory.
    pub const PLEDGES: &str = "PLEDGES";
    /// `Array<u64>`, one entry, which the agent maps into its memory: sequence of the last prompt datagram that was made.
    pub const PROMPTED: &str = "PROMPTED";
    /// `LruHashMap<FlowKey, NotedSyn>` ([`crate::agree::NotedSyn`]).
    pub const SYNS: &str = "SYNS";
    /// `HashMap<FlowKey, Pending>` ([`crate::agree::Pending`]).
    pub const PENDING: &str = "PENDING";
    /// `Queue<u32>`: slots for flows on which the kernels agree.
    pub const SPARE_SLOTS: &str = "SPARE_SLOTS";
    /// `RingBuf` of [`crate::ack_gate::OpeningEvent`].
    pub const OPENINGS: &str = "OPENINGS";
    /// `PerCpuArray<u64>` indexed by [`crate::ack_gate::AckGateVerdict`].
    pub const ACK_GATE_COUNTERS: &str = "ACK_GATE_COUNTERS";
    /// Global: the VIP, IPv4 in host byte order.
    pub const VIP: &str = "VIP";
    /// Global: index of the interface that copies leave by; 0 if the tap is not `mirror`.
    pub const MIRROR_IFINDEX: &str = "MIRROR_IFINDEX";
    /// Global: hardware address of that interface, as [`super::MirrorPeer`] holds one.
    pub const MIRROR_SOURCE: &str = "MIRROR_SOURCE";
    /// Global: [`crate::mirror::MirrorEgress`] as a number.
    pub const MIRROR_EGRESS: &str = "MIRROR_EGRESS";
    /// Global: index of the VIP's interface.
    pub const IFINDEX: &str = "IFINDEX";
    /// Global: 1 with `protect: sync`, 0 without an ACK gate.
    pub const ACK_GATE: &str = "ACK_GATE";
}

/// Name of a flow for maps with a plain marker value.
pub const PRESENT: u8 = 1;

/// Value of a port in `SERVICE_PORTS` whose service answers what only the active knows: all that it sends
/// is copied to the standby.
pub const OBSERVED: u8 = 2;

#[cfg(feature = "user")]
mod pod {
    use super::{FlowKey, MirrorPeer, NodeState, Promise};

    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for NodeState {}
    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: `repr(C)`, integers only, no padding: every bit pattern is valid.
    unsafe impl aya::Pod for Promise {}
    // SAFETY: one integer: every bit pattern is valid.
    unsafe impl aya::Pod for MirrorPeer {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ack_gate::{Guarded, OPENING_CAPTURE, OpeningEvent, Sent};

    #[test]
    fn an_entry_shorter_than_it_says_is_refused() {
        let mut entry = [0_u8; FRAME_HEADER_LEN + 8];
        entry[8..12].copy_from_slice(&3_u32.to_ne_bytes());
        entry[FRAME_HEADER_LEN..][..4].copy_from_slice(&[1, 2, 3, 4]);
        let (header, frame) = FrameHeader::split(&entry).unwrap();
        assert_eq!((header.len, frame), (3, &[1, 2, 3][..]));
        entry[8..12].copy_from_slice(&9_u32.to_ne_bytes());
        assert_eq!(FrameHeader::split(&entry), None);
        assert_eq!(FrameHeader::split(&entry[..FRAME_HEADER_LEN - 1]), None);

        let mut entry = [0_u8; size_of::<HeartbeatEvent>()];
        assert!(HeartbeatEvent::parse(&entry).is_some());
        assert!(HeartbeatEvent::parse(&entry[..entry.len() - 1]).is_none());
        entry[8..12].copy_from_slice(&(HEARTBEAT_CAPTURE as u32 + 1).to_ne_bytes());
        assert!(HeartbeatEvent::parse(&entry).is_none());

        let entry = [0_u8; size_of::<HeldEvent>()];
        assert_eq!(HeldEvent::parse(&entry), Some(HeldEvent::default()));
        assert_eq!(HeldEvent::parse(&entry[1..]), None);

        let mut entry = [0_u8; size_of::<OpeningEvent>()];
        entry[16] = OPENING_CAPTURE as u8;
        let event = OpeningEvent::parse(&entry).unwrap();
        assert_eq!(event.packet().len(), OPENING_CAPTURE);
        assert!(OpeningEvent::parse(&entry[..entry.len() - 1]).is_none());
        entry[16] += 1;
        assert!(OpeningEvent::parse(&entry).is_none());
    }

    #[test]
    fn a_mirror_peer_gives_back_its_address_and_only_zeros_are_nobody() {
        let mac = [0x02, 1, 2, 3, 4, 0xff];
        assert_eq!(MirrorPeer::at(mac).mac(), mac);
        assert!(!MirrorPeer::at([0, 0, 0, 0, 0, 1]).is_nobody());
        assert_eq!(MirrorPeer::at([0; 6]), MirrorPeer::NOBODY);
        assert!(MirrorPeer::NOBODY.is_nobody());
    }

    #[test]
    fn no_layout_has_hidden_padding() {
        assert_eq!(size_of::<NodeState>(), 16);
        assert_eq!(size_of::<FlowKey>(), 8);
        assert_eq!(size_of::<FrameHeader>(), 8 + 4 * 2 + 2 * 4);
        assert_eq!(size_of::<HeartbeatEvent>(), 8 + 4 + 4 + HEARTBEAT_CAPTURE);
        assert_eq!(size_of::<HeldEvent>(), 8 + 8 + 4 * 4);
        assert_eq!(size_of::<Guarded>(), 4 * 3);
        assert_eq!(size_of::<Sent>(), 8 + 4 * 10);
        assert_eq!(size_of::<OpeningEvent>(), 8 + 8 + 4 * 2 + OPENING_CAPTURE);
    }
}
