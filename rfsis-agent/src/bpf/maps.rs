//! Handles to the maps. Each has a file descriptor of its own and works from any thread; clones of one
//! handle share a lock, handles made anew do not.

use std::fmt;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::Pod;
use aya::maps::{Array, HashMap, IterableMap as _, Map, MapData, MapError, PerCpuArray, Queue};
use rfsis_common::ack_gate::{AckGateVerdict, Confirmation, Guarded, Sent};
use rfsis_common::agree::{AgreePeer, Pending};
use rfsis_common::maps::{FlowKey, MirrorPeer, NodeState, PRESENT, Promise, names};
use rfsis_common::mirror::MirrorVerdict;
use rfsis_common::pledge::Pledged;
use rfsis_common::prompt::{Delegated, Hop, PromptPeer, PromptSeen};
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

use super::error::BpfError;
use crate::sys::{self, SharedWords};

/// Most entries that one [`LostFlows::drain`] gives.
const DRAIN_MAX: usize = 16_384;

/// A second handle to a map.
pub(super) fn duplicate(name: &'static str, map: &Map) -> Result<Map, BpfError> {
    let (Map::Array(data)
    | Map::HashMap(data)
    | Map::LruHashMap(data)
    | Map::PerCpuArray(data)
    | Map::Queue(data)) = map
    else {
        return Err(BpfError::NotFound { kind: "map", name });
    };
    let copy = data
        .fd()
        .as_fd()
        .try_clone_to_owned()
        .map_err(MapError::from)
        .and_then(MapData::from_fd)
        .and_then(Map::from_map_data);
    copy.map_err(|error| failed("opening", name, &error))
}

fn failed(what: &str, name: &str, error: &MapError) -> BpfError {
    BpfError::new(format!("{what} map {name}"), error)
}

/// A map behind a lock: aya asks for `&mut` to write, the kernel does not.
struct Shared<M>(Arc<Mutex<M>>);

impl<M> Shared<M> {
    fn new(map: M) -> Self {
        Self(Arc::new(Mutex::new(map)))
    }

    fn lock(&self) -> MutexGuard<'_, M> {
        // The map lives in the kernel: a panic elsewhere cannot have left it half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M> Clone for Shared<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

macro_rules! opaque_debug {
    ($($handle:ident),+) => {
        $(impl fmt::Debug for $handle {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($handle)).finish_non_exhaustive()
            }
        })+
    };
}
opaque_debug!(
    StateWriter,
    RestWriter,
    MirrorWriter,
    LiveFlows,
    Approvals,
    LostFlows,
    GuardMaps,
    Counters
);

/// Writes the node's state and lease.
#[derive(Clone)]
pub struct StateWriter(Shared<Array<MapData, NodeState>>);

impl StateWriter {
    pub(super) fn new(map: Map) -> Result<Self, BpfError> {
        let map = Array::try_from(map).map_err(|error| failed("opening", names::STATE, &error))?;
        Ok(Self(Shared::new(map)))
    }

    /// Makes the programs see this state from the next frame on: one system call, nothing allocated.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn write(&self, node: NodeState) -> Result<(), BpfError> {
        let result = self.0.lock().set(0, node, 0);
        result.map_err(|error| failed("writing", names::STATE, &error))
    }

    /// What the programs see now.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn read(&self) -> Result<NodeState, BpfError> {
        let result = self.0.lock().get(&0, 0);
        result.map_err(|error| failed("reading", names::STATE, &error))
    }
}

/// Tells the programs until when the reader of the frame ring rests.
#[derive(Clone)]
pub struct RestWriter(Shared<Array<MapData, u64>>);

impl RestWriter {
    pub(super) fn new(map: Map) -> Result<Self, BpfError> {
        let map = Array::try_from(map).map_err(|error| failed("opening", names::REST, &error))?;
        Ok(Self(Shared::new(map)))
    }

    /// Frames do not wake the reader before `until` (ns, CLOCK_MONOTONIC).
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn write(&self, until: u64) -> Result<(), BpfError> {
        let result = self.0.lock().set(0, until, 0);
        result.map_err(|error| failed("writing", names::REST, &error))
    }
}

/// Writes to whom the active copies the VIP's frames.
#[derive(Clone)]
pub struct MirrorWriter(Shared<Array<MapData, MirrorPeer>>);

impl MirrorWriter {
    pub(super) fn new(map: Map) -> Result<Self, BpfError> {
        let map = Array::try_from(map).map_err(|error| failed("opening", names::MIRROR, &error))?;
        Ok(Self(Shared::new(map)))
    }

    /// Makes the programs copy to this peer from the next frame on: one system call, nothing allocated.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn write(&self, peer: MirrorPeer) -> Result<(), BpfError> {
        let result = self.0.lock().set(0, peer, 0);
        result.map_err(|error| failed("writing", names::MIRROR, &error))
    }
}

type FlowMap<V> = Shared<HashMap<MapData, FlowKey, V>>;

fn flow_map<V: Pod>(name: &'static str, map: Map) -> Result<FlowMap<V>, BpfError> {
    let map = HashMap::try_from(map).map_err(|error| failed("opening", name, &error))?;
    Ok(Shared::new(map))
}

/// Removes a flow; that it is not there is no error.
fn remove<V: Pod>(name: &str, map: &FlowMap<V>, flow: &FlowKey) -> Result<(), BpfError> {
    let result = map.lock().remove(flow);
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        result => result.map_err(|error| failed("removing from", name, &error)),
    }
}

/// The flows that live on a shadow: on the active their frames go to the frame ring.
#[derive(Clone)]
pub struct LiveFlows(FlowMap<u8>);

impl LiveFlows {
    pub(super) fn new(map: Map) -> Result<Self, BpfError> {
        flow_map(names::LIVE_FLOWS, map).map(Self)
    }

    /// Names a flow as living on a shadow.
    ///
    /// # Errors
    /// Where the map is full (`LoadParams::max_live_flows`).
    pub fn insert(&self, flow: FlowKey) -> Result<(), BpfError> {
        let result = self.0.lock().insert(flow, PRESENT, 0);
        result.map_err(|error| failed("inserting into", names::LIVE_FLOWS, &error))
    }

    /// Gives flows back to the kernel, in one system call; that one is not there is no error.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn remove(&self, flows: &[FlowKey]) -> Result<(), BpfError> {
        let map = self.0.lock();
        let result = sys::delete_batch(map.map().fd().as_fd(), flows);
        result.map_err(|error| {
            BpfError::new(format!("removing from map {}", names::LIVE_FLOWS), &error)
        })
    }
}

/// The flows whose FIN or RST may leave.
#[derive(Clone)]
pub struct Approvals(FlowMap<u8>);

impl Approvals {
    pub(super) fn new(map: Map) -> Result<Self, BpfError> {
        flow_map(names::APPROVED_FLOWS, map).map(Self)
    }

    /// Lets the FIN and RST of a flow out, until a SYN-ACK begins a new connection on the same
    /// addresses and ports.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call: the map forgets its oldest entry when full.
    pub fn approve(&self, flow: FlowKey) -> Result<(), BpfError> {
        let result = self.0.lock().insert(flow, PRESENT, 0);
        result.map_err(|error| failed("inserting into", names::APPROVED_FLOWS, &error))
    }

    /// Takes an approval back.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn revoke(&self, flow: &FlowKey) -> Result<(), BpfError> {
        remove(names::APPROVED_FLOWS, &self.0, flow)
    }
}

/// The flows that lost a copy to a full frame ring.
#[derive(Clone)]
pub struct LostFlows(FlowMap<u64>);

impl LostFlows {
    pub(super) fn new(map: Map) -> Result<Self, BpfError> {
        flow_map(names::LOST_FLOWS, map).map(Self)
    }

    /// Takes out what is there: flows and the time of a loss (ns, CLOCK_MONOTONIC). One system call
    /// where there is nothing.
    ///
    /// # Errors
    /// Only where the kernel refuses a system call.
    pub fn drain(&self) -> Result<Vec<(FlowKey, u64)>, BpfError> {
        let mut map = self.0.lock();
        // Bounded, and only then removed: the walk begins anew where its key vanishes under it.
        let lost: Vec<(FlowKey, u64)> = map.iter().take(DRAIN_MAX).filter_map(Result::ok).collect();
        for (flow, _) in &lost {
            match map.remove(flow) {
                // The map forgot its oldest entry by itself.
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(MapError::SyscallError(error))
                    if error.io_error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("draining", names::LOST_FLOWS, &error)),
            }
        }
        Ok(lost)
    }
}

/// Most times that [`GuardMaps::sent`] looks. A write takes nanoseconds, two looks less than a
/// microsecond, so even a flow with a million segments a second is soon found at rest.
const LOOKS_MAX: usize = 8;

/// What the agent tells the ACK gate, and the gate the agent.
///
/// A flow has a slot, below `GuardParams::max_flows`, which the agent chooses. In this order: `reset` and
/// `confirm` its slot, `publish` it, `withdraw` it. Let a withdrawn flow's slot rest for a moment (a
/// millisecond will do) before another gets it: a segment on its way through the gate may still write there.
#[derive(Clone)]
pub struct GuardMaps {
    mode: Shared<Array<MapData, u64>>,
    flows: FlowMap<Guarded>,
    confirmed: Arc<SharedWords>,
    sent: Shared<Array<MapData, Sent>>,
    delegated: Shared<Array<MapData, Delegated>>,
    hops: Shared<Array<MapData, Hop>>,
    prompt: Shared<Array<MapData, PromptPeer>>,
    prompt_seen: Shared<Array<MapData, PromptSeen>>,
    agree: AgreeMaps,
}

/// What the agent and the programs tell each other of openings on which the kernels agree.
#[derive(Clone)]
pub(super) struct AgreeMaps {
    peer: Shared<Array<MapData, AgreePeer>>,
    promise: Shared<Array<MapData, Promise>>,
    pledged: FlowMap<Pledged>,
    pending: FlowMap<Pending>,
    spare: Shared<Queue<MapData, u32>>,
}

impl AgreeMaps {
    pub(super) fn new(
        peer: Map,
        promise: Map,
        pledged: Map,
        pending: Map,
        spare: Map,
    ) -> Result<Self, BpfError> {
        let spare = Queue::try_from(spare);
        let spare = spare.map_err(|error| failed("opening", names::SPARE_SLOTS, &error))?;
        Ok(Self {
            peer: array(names::AGREE, peer)?,
            promise: array(names::PROMISE, promise)?,
            pledged: flow_map(names::PLEDGED, pledged)?,
            pending: flow_map(names::PENDING, pending)?,
            spare: Shared::new(spare),
        })
    }
}

fn array<V: Pod>(name: &'static str, map: Map) -> Result<Shared<Array<MapData, V>>, BpfError> {
    let map = Array::try_from(map).map_err(|error| failed("opening", name, &error))?;
    Ok(Shared::new(map))
}

/// The values of an array, in memory, each of so many words.
pub(super) fn words(name: &'static str, map: &Map, value: usize) -> Result<SharedWords, BpfError> {
    let Map::Array(data) = map else {
        return Err(BpfError::NotFound { kind: "map", name });
    };
    let info = data
        .info()
        .map_err(|error| failed("asking about", name, &error))?;
    let len = NonZeroUsize::try_from(info.max_entries() as usize * value);
    let len = len.map_err(|_| BpfError::NotFound { kind: "map", name })?;
    let words = SharedWords::map(data.fd(), len);
    words.map_err(|error| {
        failed(
            "mapping",
            name,
            &MapError::from(std::io::Error::from(error)),
        )
    })
}

impl GuardMaps {
    #[expect(
        clippy::too_many_arguments,
        reason = "one for each map, made by one caller"
    )]
    pub(super) fn new(
        mode: Map,
        flows: Map,
        confirmed: Map,
        sent: Map,
        delegated: Map,
        hops: Map,
        prompt: Map,
        prompt_seen: Map,
        agree: AgreeMaps,
    ) -> Result<Self, BpfError> {
        Ok(Self {
            mode: array(names::GUARD, mode)?,
            flows: flow_map(names::GUARDED, flows)?,
            confirmed: Arc::new(words(names::CONFIRMED, &confirmed, 1)?),
            sent: array(names::SENT, sent)?,
            delegated: array(names::DELEGATED, delegated)?,
            hops: array(names::HOPS, hops)?,
            prompt: array(names::PROMPT, prompt)?,
            prompt_seen: array(names::PROMPT_SEEN, prompt_seen)?,
            agree,
        })
    }

    /// Makes the gate guard (a standby answers) or opens it.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn set_mode(&self, guards: bool) -> Result<(), BpfError> {
        let result = self.mode.lock().set(0, u64::from(guards), 0);
        result.map_err(|error| failed("writing", names::GUARD, &error))
    }

    /// Lets the gate know a flow: its SYN-ACK passes, its acknowledgements are guarded.
    ///
    /// # Errors
    /// Where the map is full (`GuardParams::max_flows`).
    pub fn publish(&self, flow: FlowKey, guarded: Guarded) -> Result<(), BpfError> {
        let result = self.flows.lock().insert(flow, guarded, 0);
        result.map_err(|error| failed("inserting into", names::GUARDED, &error))
    }

    /// Lets the gate forget a flow: it is unguarded from now on. That it is not there is no error: the
    /// gate forgets one itself when a later connection of the same addresses and ports opens.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn withdraw(&self, flow: &FlowKey) -> Result<(), BpfError> {
        remove(names::GUARDED, &self.flows, flow)
    }

    /// Whether the gate knows a flow.
    pub fn is_published(&self, flow: &FlowKey) -> bool {
        self.flows.lock().get(flow, 0).is_ok()
    }

    fn confirmation(&self, slot: u32) -> Option<&AtomicU64> {
        self.confirmed.get(slot as usize)
    }

    /// Tells the gate what the standby holds of the flow in a slot, whatever it was told before; `false` where there
    /// is no such slot.
    #[must_use]
    pub fn confirm(&self, slot: u32, confirmation: Confirmation) -> bool {
        let word = self.confirmation(slot);
        word.map(|word| word.store(confirmation.word(), Ordering::SeqCst))
            .is_some()
    }

    /// Tells it more, beside what the programs take by themselves; gives all that is confirmed now.
    pub fn confirm_more(&self, slot: u32, confirmation: Confirmation) -> Confirmation {
        let Some(word) = self.confirmation(slot) else {
            return confirmation;
        };
        let all = |known| Confirmation::from_word(known).with(confirmation);
        let mut known = word.load(Ordering::SeqCst);
        loop {
            let (next, order) = (all(known), Ordering::SeqCst);
            match word.compare_exchange_weak(known, next.word(), order, order) {
                Ok(_) => return next,
                Err(found) => known = found,
            }
        }
    }

    /// What the gate knows that the standby holds; nothing where there is no such slot.
    pub fn confirmed(&self, slot: u32) -> Confirmation {
        let word = self.confirmation(slot);
        word.map_or_else(Confirmation::default, |word| {
            Confirmation::from_word(word.load(Ordering::SeqCst))
        })
    }

    /// Lets the programs take confirmations of the flow in a slot by themselves, or no longer.
    ///
    /// # Errors
    /// Where there is no such slot.
    pub fn delegate(&self, slot: u32, delegated: Delegated) -> Result<(), BpfError> {
        let result = self.delegated.lock().set(slot, delegated, 0);
        result.map_err(|error| failed("writing", names::DELEGATED, &error))
    }

    /// Which prompt datagrams have come from the peer whose element this is.
    pub fn prompts_seen(&self, peer: u32) -> PromptSeen {
        self.prompt_seen.lock().get(&peer, 0).unwrap_or_default()
    }

    /// Notes one that came to the agent.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn note_prompt(&self, peer: u32, seen: PromptSeen) -> Result<(), BpfError> {
        let result = self.prompt_seen.lock().set(peer, seen, 0);
        result.map_err(|error| failed("writing", names::PROMPT_SEEN, &error))
    }

    /// Tells the programs from whom they take prompt datagrams.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn take_prompts(&self, peer: PromptPeer) -> Result<(), BpfError> {
        self.note_prompt(peer.seen, PromptSeen::default())?;
        let result = self.prompt.lock().set(0, peer, 0);
        result.map_err(|error| failed("writing", names::PROMPT, &error))
    }

    /// Tells the programs with whom they agree on openings.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn agree_with(&self, peer: AgreePeer) -> Result<(), BpfError> {
        let result = self.agree.peer.lock().set(0, peer, 0);
        result.map_err(|error| failed("writing", names::AGREE, &error))
    }

    /// Lets the program of a standby answer and confirm for its agent.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn promise(&self, promise: Promise) -> Result<(), BpfError> {
        let result = self.agree.promise.lock().set(0, promise, 0);
        result.map_err(|error| failed("writing", names::PROMISE, &error))
    }

    /// Tells the programs of a flow's pledge.
    ///
    /// # Errors
    /// Where the map is full.
    pub fn pledge(&self, flow: FlowKey, pledged: Pledged) -> Result<(), BpfError> {
        let result = self.agree.pledged.lock().insert(flow, pledged, 0);
        result.map_err(|error| failed("inserting into", names::PLEDGED, &error))
    }

    /// Lets them forget it; that it is not there is no error.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn retract(&self, flow: &FlowKey) -> Result<(), BpfError> {
        remove(names::PLEDGED, &self.agree.pledged, flow)
    }

    /// Gives the programs a slot for a flow on which the kernels agree.
    ///
    /// # Errors
    /// Where they have as many as they can have.
    pub fn lend(&self, slot: u32) -> Result<(), BpfError> {
        let result = self.agree.spare.lock().push(slot, 0);
        result.map_err(|error| failed("pushing into", names::SPARE_SLOTS, &error))
    }

    /// The SYN-ACK of this flow that the programs keep, if they do.
    pub fn kept(&self, flow: &FlowKey) -> Option<Pending> {
        self.agree.pending.lock().get(flow, 0).ok()
    }

    /// Takes a SYN-ACK from the programs that they keep; `false` where they do not.
    pub fn claim(&self, flow: &FlowKey) -> bool {
        self.agree.pending.lock().remove(flow).is_ok()
    }

    /// What the kernel sent of the flow in a slot, and what the client was told. `None` where there is no
    /// such slot, or the gate is writing it each time one looks.
    pub fn sent(&self, slot: u32) -> Option<Sent> {
        let mut last = self.glimpse(slot)?;
        for _ in 1..LOOKS_MAX {
            let next = self.glimpse(slot)?;
            if next == last && next.version.is_multiple_of(2) {
                return Some(next);
            }
            last = next;
        }
        None
    }

    /// What a slot holds at this moment: half-written, if the gate is writing it, and then its version is
    /// odd. `None` where there is no such slot.
    pub fn glimpse(&self, slot: u32) -> Option<Sent> {
        self.sent.lock().get(&slot, 0).ok()
    }

    /// Prepares a slot for a flow that the gate does not know yet.
    ///
    /// # Errors
    /// Where there is no such slot.
    pub fn reset(&self, slot: u32, sent: Sent) -> Result<(), BpfError> {
        self.delegate(slot, Delegated::default())?;
        let result = self.hops.lock().set(slot, Hop::default(), 0);
        result.map_err(|error| failed("writing", names::HOPS, &error))?;
        let result = self.sent.lock().set(slot, sent, 0);
        result.map_err(|error| failed("writing", names::SENT, &error))
    }
}

/// Frames by verdict of the XDP program, all CPUs together, since the programs were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpCounters([u64; XdpVerdict::ALL.len()]);

impl XdpCounters {
    /// Frames with this verdict.
    pub fn get(&self, verdict: XdpVerdict) -> u64 {
        self.0[verdict as usize]
    }

    /// All verdicts with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (XdpVerdict, u64)> {
        XdpVerdict::ALL.into_iter().zip(self.0)
    }
}

/// Packets by verdict of the gate, all CPUs together, since the programs were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateCounters([u64; GateVerdict::ALL.len()]);

impl GateCounters {
    /// Packets with this verdict.
    pub fn get(&self, verdict: GateVerdict) -> u64 {
        self.0[verdict as usize]
    }

    /// All verdicts with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (GateVerdict, u64)> {
        GateVerdict::ALL.into_iter().zip(self.0)
    }
}

/// Frames of the VIP by what became of their copies, all CPUs together, since the programs were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MirrorCounters([u64; MirrorVerdict::ALL.len()]);

impl MirrorCounters {
    /// Frames with this verdict.
    pub fn get(&self, verdict: MirrorVerdict) -> u64 {
        self.0[verdict as usize]
    }
}

/// Packets by verdict of the ACK gate, all CPUs together, since the programs were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AckGateCounters([u64; AckGateVerdict::ALL.len()]);

impl AckGateCounters {
    /// Packets with this verdict.
    pub fn get(&self, verdict: AckGateVerdict) -> u64 {
        self.0[verdict as usize]
    }
}

/// Reads the verdict counters.
#[derive(Clone)]
pub struct Counters {
    xdp: Arc<PerCpuArray<MapData, u64>>,
    gate: Arc<PerCpuArray<MapData, u64>>,
    mirror: Arc<PerCpuArray<MapData, u64>>,
    ack_gate: Arc<PerCpuArray<MapData, u64>>,
}

impl Counters {
    pub(super) fn new(xdp: Map, gate: Map, mirror: Map, ack_gate: Map) -> Result<Self, BpfError> {
        let open = |name, map| match PerCpuArray::try_from(map) {
            Ok(counters) => Ok(Arc::new(counters)),
            Err(error) => Err(failed("opening", name, &error)),
        };
        Ok(Self {
            xdp: open(names::XDP_COUNTERS, xdp)?,
            gate: open(names::GATE_COUNTERS, gate)?,
            mirror: open(names::MIRROR_COUNTERS, mirror)?,
            ack_gate: open(names::ACK_GATE_COUNTERS, ack_gate)?,
        })
    }

    /// Counts of the XDP program.
    ///
    /// # Errors
    /// Only where the kernel refuses a system call.
    pub fn xdp(&self) -> Result<XdpCounters, BpfError> {
        sums(&self.xdp)
            .map(XdpCounters)
            .map_err(|error| failed("reading", names::XDP_COUNTERS, &error))
    }

    /// Counts of the gate.
    ///
    /// # Errors
    /// Only where the kernel refuses a system call.
    pub fn gate(&self) -> Result<GateCounters, BpfError> {
        sums(&self.gate)
            .map(GateCounters)
            .map_err(|error| failed("reading", names::GATE_COUNTERS, &error))
    }

    /// Counts of the copies for the standby.
    ///
    /// # Errors
    /// Only where the kernel refuses a system call.
    pub fn mirror(&self) -> Result<MirrorCounters, BpfError> {
        sums(&self.mirror)
            .map(MirrorCounters)
            .map_err(|error| failed("reading", names::MIRROR_COUNTERS, &error))
    }

    /// Counts of the ACK gate.
    ///
    /// # Errors
    /// Only where the kernel refuses a system call.
    pub fn ack_gate(&self) -> Result<AckGateCounters, BpfError> {
        sums(&self.ack_gate)
            .map(AckGateCounters)
            .map_err(|error| failed("reading", names::ACK_GATE_COUNTERS, &error))
    }
}

fn sums<const N: usize>(map: &PerCpuArray<MapData, u64>) -> Result<[u64; N], MapError> {
    let mut sums = [0; N];
    for (index, sum) in (0..).zip(&mut sums) {
        *sum = map.get(&index, 0)?.iter().sum();
    }
    Ok(sums)
}
