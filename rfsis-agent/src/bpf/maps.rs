//! Handles to the maps. Each has a file descriptor of its own and works from any thread; clones of one
//! handle share a lock, handles made anew do not.

use std::fmt;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use rfsis_common::maps::{FlowKey, MirrorPeer, NodeState, PRESENT, names};
use rfsis_common::mirror::MirrorVerdict;
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

use super::error::BpfError;

/// Most entries that one [`LostFlows::drain`] gives.
const DRAIN_MAX: usize = 16_384;

/// A second handle to a map.
pub(super) fn duplicate(name: &'static str, map: &Map) -> Result<Map, BpfError> {
    let (Map::Array(data) | Map::HashMap(data) | Map::LruHashMap(data) | Map::PerCpuArray(data)) =
        map
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
    MirrorWriter,
    LiveFlows,
    Approvals,
    LostFlows,
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

    /// Gives a flow back to the kernel; that it is not there is no error.
    ///
    /// # Errors
    /// Only where the kernel refuses the system call.
    pub fn remove(&self, flow: &FlowKey) -> Result<(), BpfError> {
        remove(names::LIVE_FLOWS, &self.0, flow)
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

/// Reads the verdict counters.
#[derive(Clone)]
pub struct Counters {
    xdp: Arc<PerCpuArray<MapData, u64>>,
    gate: Arc<PerCpuArray<MapData, u64>>,
    mirror: Arc<PerCpuArray<MapData, u64>>,
}

impl Counters {
    pub(super) fn new(xdp: Map, gate: Map, mirror: Map) -> Result<Self, BpfError> {
        let open = |name, map| match PerCpuArray::try_from(map) {
            Ok(counters) => Ok(Arc::new(counters)),
            Err(error) => Err(failed("opening", name, &error)),
        };
        Ok(Self {
            xdp: open(names::XDP_COUNTERS, xdp)?,
            gate: open(names::GATE_COUNTERS, gate)?,
            mirror: open(names::MIRROR_COUNTERS, mirror)?,
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
}

fn sums<const N: usize>(map: &PerCpuArray<MapData, u64>) -> Result<[u64; N], MapError> {
    let mut sums = [0; N];
    for (index, sum) in (0..).zip(&mut sums) {
        *sum = map.get(&index, 0)?.iter().sum();
    }
    Ok(sums)
}
