//! Maps and globals; their layouts and names are those of `rfsis_common::maps`.

use crate::agree::Scratch;
use crate::atomic;
use crate::pledge;
use aya_ebpf::{
    Global,
    bindings::BPF_F_MMAPABLE,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, Queue, RingBuf},
};
use rfsis_common::ack_gate::{AckGateVerdict, Confirmation, Guarded, Sent};
use rfsis_common::agree::{AgreePeer, NotedSyn, Pending, SPARE_SLOTS_MAX};
use rfsis_common::maps::{FlowKey, MirrorPeer, NodeState, Promise};
use rfsis_common::mirror::{MirrorEgress, MirrorVerdict};
use rfsis_common::pledge::{PLEDGES_MAX, Pledge, Pledged};
use rfsis_common::prompt::{Delegated, Hop, MAX_LEN, PromptPeer, PromptRecord, PromptSeen, Words};
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

/// The VIP, IPv4 in host byte order; the loader sets it.
#[unsafe(no_mangle)]
static VIP: Global<u32> = Global::new(0);

/// Interface that copies leave by, 0 for none; the loader sets it.
#[unsafe(no_mangle)]
static MIRROR_IFINDEX: Global<u32> = Global::new(0);

/// Hardware address of that interface; the loader sets it.
#[unsafe(no_mangle)]
static MIRROR_SOURCE: Global<u64> = Global::new(0);

/// `MirrorEgress` as a number; the loader sets it.
#[unsafe(no_mangle)]
static MIRROR_EGRESS: Global<u32> = Global::new(0);

/// Index of the VIP's interface; the loader sets it.
#[unsafe(no_mangle)]
static IFINDEX: Global<u32> = Global::new(0);

/// 1 with an ACK gate, 0 without; the loader sets it.
#[unsafe(no_mangle)]
static ACK_GATE: Global<u32> = Global::new(0);

#[map]
static MIRROR: Array<MirrorPeer> = Array::with_max_entries(1, 0);

#[map]
static STATE: Array<NodeState> = Array::with_max_entries(1, 0);

/// The loader sizes it.
#[map]
pub static LIVE_FLOWS: HashMap<FlowKey, u8> = HashMap::with_max_entries(20_000, 0);

#[map]
pub static APPROVED_FLOWS: LruHashMap<FlowKey, u8> = LruHashMap::with_max_entries(65_536, 0);

#[map]
pub static LOST_FLOWS: LruHashMap<FlowKey, u64> = LruHashMap::with_max_entries(16_384, 0);

/// The loader sizes it.
#[map]
pub static SERVICE_PORTS: HashMap<u16, u8> = HashMap::with_max_entries(64, 0);

/// The loader sizes it.
#[map]
pub static DATAGRAM_PORTS: HashMap<u16, u8> = HashMap::with_max_entries(64, 0);

/// A second of heartbeats at one a millisecond.
#[map]
pub static HEARTBEATS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// The loader sizes it.
#[map]
pub static FRAMES: RingBuf = RingBuf::with_byte_size(32 * 1024 * 1024, 0);

#[map]
static REST: Array<u64> = Array::with_max_entries(1, 0);

#[map]
pub static HELD: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

#[map]
static GUARD: Array<u64> = Array::with_max_entries(1, 0);

/// The loader sizes it.
#[map]
pub static GUARDED: HashMap<FlowKey, Guarded> = HashMap::with_max_entries(1, 0);

/// The loader sizes it. Agent and programs exchange its words in the same memory.
#[map]
static CONFIRMED: Array<Confirmation> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// The loader sizes it.
#[map]
static SENT: Array<Sent> = Array::with_max_entries(1, 0);

/// The loader sizes it.
#[map]
static DELEGATED: Array<Delegated> = Array::with_max_entries(1, 0);

/// The loader sizes it.
#[map]
static HOPS: Array<Hop> = Array::with_max_entries(1, 0);

#[map]
static PROMPT: Array<PromptPeer> = Array::with_max_entries(1, 0);

#[map]
static PROMPT_SEEN: Array<PromptSeen> = Array::with_max_entries(2, 0);

/// A datagram does not fit the stack.
#[map]
static PROMPT_WORDS: PerCpuArray<Words> = PerCpuArray::with_max_entries(1, 0);

#[map]
static AGREE: Array<AgreePeer> = Array::with_max_entries(1, 0);

#[map]
static PROMISE: Array<Promise> = Array::with_max_entries(1, 0);

#[map]
static PLEDGED: HashMap<FlowKey, Pledged> = HashMap::with_max_entries(PLEDGES_MAX, 0);

/// Agent and programs exchange its words in the same memory.
#[map]
static PLEDGES: Array<Pledge> = Array::with_max_entries(PLEDGES_MAX, BPF_F_MMAPABLE);

/// The same.
#[map]
static PROMPTED: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
pub static SYNS: LruHashMap<FlowKey, NotedSyn> = LruHashMap::with_max_entries(16_384, 0);

#[map]
pub static PENDING: HashMap<FlowKey, Pending> = HashMap::with_max_entries(4096, 0);

#[map]
pub static SPARE_SLOTS: Queue<u32> = Queue::with_max_entries(SPARE_SLOTS_MAX, 0);

#[map]
static PLEDGE_SCRATCH: PerCpuArray<pledge::Scratch> = PerCpuArray::with_max_entries(1, 0);

#[map]
static AGREE_SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// More than 9,000 handshakes.
#[map]
pub static OPENINGS: RingBuf = RingBuf::with_byte_size(4 * 1024 * 1024, 0);

#[map]
static XDP_COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(XdpVerdict::ALL.len() as u32, 0);

#[map]
static GATE_COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(GateVerdict::ALL.len() as u32, 0);

#[map]
static MIRROR_COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(MirrorVerdict::ALL.len() as u32, 0);

#[map]
static ACK_GATE_COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(AckGateVerdict::ALL.len() as u32, 0);

/// The VIP, host byte order.
#[inline(always)]
pub fn vip() -> u32 {
    VIP.load()
}

/// The node's state and lease, as the agent wrote them last.
#[inline(always)]
pub fn node_state() -> NodeState {
    match STATE.get_ptr(0) {
        // SAFETY: the pointer is to the array's only element. The agent writes it meanwhile, word by
        // word: volatile, so that each word is read once and a decision sees one value of it.
        Some(node) => unsafe {
            NodeState {
                state: core::ptr::read_volatile(&raw const (*node).state),
                lease_ns: core::ptr::read_volatile(&raw const (*node).lease_ns),
            }
        },
        None => NodeState::default(),
    }
}

/// Until when the reader of the frame ring rests, ns.
#[inline(always)]
pub fn rest_until() -> u64 {
    match REST.get_ptr(0) {
        // SAFETY: the pointer is to the array's only element, one word that the agent may be writing:
        // volatile, so that it is read once.
        Some(until) => unsafe { core::ptr::read_volatile(until) },
        None => 0,
    }
}

/// The reader is woken: its rest is over.
#[inline(always)]
pub fn end_rest() {
    if let Some(until) = REST.get_ptr_mut(0) {
        // SAFETY: as in `rest_until`. Whoever writes last, the agent writes again before it sleeps.
        unsafe { core::ptr::write_volatile(until, 0) }
    }
}

/// The interface that copies leave by, 0 for none.
#[inline(always)]
pub fn mirror_ifindex() -> u32 {
    MIRROR_IFINDEX.load()
}

/// The hardware address that copies come from.
#[inline(always)]
pub fn mirror_source() -> MirrorPeer {
    MirrorPeer::from_word(MIRROR_SOURCE.load())
}

/// What of the VIP's output is copied.
#[inline(always)]
pub fn mirror_egress() -> MirrorEgress {
    if MIRROR_EGRESS.load() == MirrorEgress::Handshake as u32 {
        MirrorEgress::Handshake
    } else {
        MirrorEgress::Full
    }
}

/// To whom the VIP's frames are copied, as the agent wrote it last.
#[inline(always)]
pub fn mirror_peer() -> MirrorPeer {
    match MIRROR.get_ptr(0) {
        // SAFETY: the pointer is to the array's only element, one word that the agent may be writing:
        // volatile, so that it is read once.
        Some(peer) => unsafe { core::ptr::read_volatile(peer) },
        None => MirrorPeer::NOBODY,
    }
}

/// Whether there is an ACK gate. Known when the programs are loaded: without one the verifier removes
/// what it would cost.
#[inline(always)]
pub fn has_ack_gate() -> bool {
    ACK_GATE.load() != 0
}

/// Whether the ACK gate guards, as the agent wrote it last: a standby answers.
#[inline(always)]
pub fn is_guarding() -> bool {
    match GUARD.get_ptr(0) {
        // SAFETY: the pointer is to the array's only element, one word that the agent may be writing:
        // volatile, so that it is read once.
        Some(mode) => unsafe { core::ptr::read_volatile(mode) != 0 },
        None => false,
    }
}

/// What the standby confirmed of the flow in a slot.
#[inline(always)]
pub fn confirmation(slot: u32) -> Option<Confirmation> {
    let confirmation = CONFIRMED.get_ptr(slot)?;
    // SAFETY: the pointer is to an element of the array, one word that the agent, or a program on another CPU, may
    // be writing: volatile, so that it is read once.
    Some(unsafe { core::ptr::read_volatile(confirmation) })
}

/// Notes what a prompt datagram says of the flow in a slot; `false` if it is for the agent to hear.
#[inline(always)]
pub fn note_prompted(slot: u32, record: &PromptRecord) -> bool {
    let (Some(delegated), Some(confirmed)) = (DELEGATED.get_ptr(slot), confirmed(slot)) else {
        return false;
    };
    // SAFETY: the pointers are to elements of arrays, one word each: volatile, so that it is read once.
    let (delegated, mut known) = unsafe {
        (
            core::ptr::read_volatile(delegated),
            core::ptr::read_volatile(confirmed),
        )
    };
    if !delegated.takes(record.client_isn) {
        return false;
    }
    // Another CPU may note another datagram's, or the agent what it heard.
    for _ in 0..4 {
        let all = known.with(record.confirmation);
        if known == Confirmation::default() || all.is_open() {
            return false;
        }
        // SAFETY: the pointer is to an element of the array, which nobody writes but as a whole.
        let found = Confirmation::from_word(unsafe {
            atomic::compare_exchange(confirmed.cast(), known.word(), all.word())
        });
        if found == known {
            return true;
        }
        known = found;
    }
    false
}

/// From whom prompt datagrams are taken, as the agent wrote it last.
#[inline(always)]
pub fn prompt_peer() -> Option<*const PromptPeer> {
    PROMPT.get_ptr(0)
}

/// Which of its datagrams came already.
#[inline(always)]
pub fn prompt_seen(key: u32) -> Option<*mut PromptSeen> {
    PROMPT_SEEN.get_ptr_mut(key)
}

/// Room for a datagram, this CPU's.
#[inline(always)]
pub fn prompt_words() -> Option<*mut Words> {
    const _: () = assert!(size_of::<Words>() == MAX_LEN);
    PROMPT_WORDS.get_ptr_mut(0)
}

/// Who takes part in agreements of the kernels, as the agent wrote it last.
#[inline(always)]
pub fn agree_peer() -> Option<*const AgreePeer> {
    AGREE.get_ptr(0)
}

/// What the agent of a standby lets its program say for it.
#[inline(always)]
pub fn promise() -> Promise {
    match PROMISE.get_ptr(0) {
        // SAFETY: the pointer is to the array's only element, words that the agent may be writing: volatile, so that
        // each is read once.
        Some(promise) => unsafe { core::ptr::read_volatile(promise) },
        None => Promise::default(),
    }
}

/// The pledge of a flow, if there is one.
#[inline(always)]
pub fn pledge(flow: FlowKey) -> Option<(Pledged, *mut Pledge)> {
    // SAFETY: copied at once; an entry is replaced as a whole, never written in place.
    let pledged = unsafe { PLEDGED.get(flow).copied() }?;
    Some((pledged, PLEDGES.get_ptr_mut(pledged.slot)?))
}

/// The sequence of the next prompt datagram.
#[inline(always)]
pub fn next_sequence() -> Option<u64> {
    let last = PROMPTED.get_ptr_mut(0)?;
    // SAFETY: the pointer is to the array's only element, which nobody writes but as a whole.
    Some(unsafe { atomic::fetch_add(last, 1) }.wrapping_add(1))
}

/// Room for a confirmation, this CPU's.
#[inline(always)]
pub fn pledge_scratch() -> Option<*mut pledge::Scratch> {
    PLEDGE_SCRATCH.get_ptr_mut(0)
}

/// Room for an agreement, this CPU's.
#[inline(always)]
pub fn agree_scratch() -> Option<*mut Scratch> {
    AGREE_SCRATCH.get_ptr_mut(0)
}

/// Where it stands what the standby confirmed of the flow in a slot.
#[inline(always)]
pub fn confirmed(slot: u32) -> Option<*mut Confirmation> {
    CONFIRMED.get_ptr_mut(slot)
}

/// Where it stands of which connection of a slot the programs take confirmations.
#[inline(always)]
pub fn delegated(slot: u32) -> Option<*mut Delegated> {
    DELEGATED.get_ptr_mut(slot)
}

/// How segments of the flow in a slot leave.
#[inline(always)]
pub fn hop(slot: u32) -> Option<*mut Hop> {
    HOPS.get_ptr_mut(slot)
}

/// Index of the VIP's interface.
#[inline(always)]
pub fn ifindex() -> u32 {
    IFINDEX.load()
}

/// What is known of a flow, if the standby knows it.
#[inline(always)]
pub fn guarded(flow: FlowKey) -> Option<Guarded> {
    // SAFETY: copied at once; an entry is replaced as a whole, never written in place.
    unsafe { GUARDED.get(flow).copied() }
}

/// Behind the last sequence number that the kernel sent on a flow that the standby knows.
#[inline(always)]
pub fn sent_next(flow: FlowKey) -> Option<u32> {
    let sent = sent(guarded(flow)?.slot)?;
    // SAFETY: the pointer is to an element of the array; the gate may be writing this word on another
    // CPU: volatile, so that it is read once.
    Some(unsafe { core::ptr::read_volatile(&raw const (*sent).next) })
}

/// Where it stands what the kernel sent of the flow in a slot.
#[inline(always)]
pub fn sent(slot: u32) -> Option<*mut Sent> {
    SENT.get_ptr_mut(slot)
}

/// Counts a verdict of the ACK gate; gives this CPU's count.
#[inline(always)]
pub fn count_ack_gate(verdict: AckGateVerdict) -> u64 {
    count(&ACK_GATE_COUNTERS, verdict as u32)
}

/// Counts what became of a copy; gives this CPU's count.
#[inline(always)]
pub fn count_mirror(verdict: MirrorVerdict) -> u64 {
    count(&MIRROR_COUNTERS, verdict as u32)
}

/// Counts a verdict of the XDP program; gives this CPU's count.
#[inline(always)]
pub fn count_xdp(verdict: XdpVerdict) -> u64 {
    count(&XDP_COUNTERS, verdict as u32)
}

/// Counts a verdict of the gate; gives this CPU's count.
#[inline(always)]
pub fn count_gate(verdict: GateVerdict) -> u64 {
    count(&GATE_COUNTERS, verdict as u32)
}

#[inline(always)]
fn count(counters: &PerCpuArray<u64>, index: u32) -> u64 {
    match counters.get_ptr_mut(index) {
        // SAFETY: the slot is this CPU's alone, and programs do not interrupt each other: both hooks of
        // TC and XDP run with bottom halves off.
        Some(counter) => unsafe {
            *counter += 1;
            *counter
        },
        None => 0,
    }
}

/// Whether a rare event with this count is worth a log line: the first, and each time the count
/// has doubled.
#[inline(always)]
pub fn worth_logging(count: u64) -> bool {
    count.is_power_of_two()
}
