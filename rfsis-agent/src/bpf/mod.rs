//! The programs in the kernel: load, attach, ask, remove.
//!
//! The XDP program is held by a link and goes with the agent. The **gate** is a filter on clsact egress,
//! attached by netlink with a fixed priority and handle: it outlives the agent, however that ends, and
//! stays closed since nobody renews its lease. The next agent replaces it in place. So it is with the
//! **mirror** on clsact ingress, which copies nothing without a lease either, and with the program that is
//! in its place, and in that of XDP, where TC catches the frames.
//!
//! Order of a start: [`Programs::load`] (state standby, so the gate is closed), [`Programs::attach_gate`],
//! [`Programs::attach_ingress`], only then the VIP is configured. Order of a stop: the VIP is removed, then
//! [`Programs::detach`].

mod error;
mod filter;
mod leftover;
mod log;
mod maps;
mod test_run;

use std::fmt;
use std::net::Ipv4Addr;

use aya::maps::{HashMap, Map, MapData, RingBuf};
use aya::programs::links::Link as _;
use aya::programs::xdp::{XdpLinkId, XdpMode as AyaXdpMode};
use aya::programs::{SchedClassifier, TcAttachType, Xdp};
use aya::{Ebpf, EbpfLoader};
use rfsis_common::maps::{MirrorPeer, NodeState, OBSERVED, PRESENT, names};
use rfsis_common::mirror::MirrorEgress;
use rfsis_common::pledge;
use serde::{Deserialize, Serialize};

pub use error::BpfError;
pub use leftover::cleanup;
pub use log::ProgramLog;
pub use maps::{
    AckGateCounters, Approvals, Counters, GateCounters, GuardMaps, LiveFlows, LostFlows,
    MirrorCounters, MirrorWriter, RestWriter, StateWriter, XdpCounters,
};
pub use test_run::{Program, SkbContext};

use crate::pledge::Words;
use error::os_error;
use filter::FilterError;
use maps::{AgreeMaps, duplicate};

/// The compiled programs; empty where the agent was built without them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rfsis-ebpf.o"));

/// What is fixed when the programs are loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadParams<'a> {
    /// The virtual IP.
    pub vip: Ipv4Addr,
    /// TCP ports of the services, whose FIN and RST the gate holds.
    pub service_ports: &'a [u16],
    /// Those of them whose services answer what only the active knows.
    pub observed_ports: &'a [u16],
    /// UDP ports of the services, whose ICMP port unreachable the gate holds.
    pub datagram_ports: &'a [u16],
    /// Size of the frame ring, bytes; made a power of two.
    pub frame_ring_bytes: u32,
    /// Flows that may live on shadows at once.
    pub max_live_flows: u32,
    /// Where copies go, with tap `mirror`.
    pub mirror: Option<MirrorParams>,
    /// The ACK gate, with `protect: sync`.
    pub guard: Option<GuardParams>,
}

/// What the ACK gate has room for.
#[derive(Clone, Copy, Debug)]
pub struct GuardParams {
    /// Flows that may be guarded at once, and slots that are lent to the programs meanwhile.
    pub slots: u32,
    /// Index of the VIP's interface.
    pub ifindex: u32,
}

/// Where and how copies for the standby leave.
#[derive(Clone, Copy, Debug)]
pub struct MirrorParams {
    /// Index of the interface that they leave by.
    pub ifindex: u32,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// What of the VIP's output is copied.
    pub egress: MirrorEgress,
}

/// How frames are caught on ingress.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// By XDP in the driver, before a socket buffer is made.
    Native,
    /// By TC, in the kernel's receive path: for drivers without XDP, and for veth.
    Tc,
}

impl XdpMode {
    /// Both modes.
    pub const ALL: [XdpMode; 2] = [XdpMode::Native, XdpMode::Tc];

    /// The word used in logs, metrics and `status`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Tc => "tc",
        }
    }
}

/// An interface on which this process attached a gate.
#[derive(Debug)]
struct Gate {
    interface: String,
    /// The qdisc was made for the gate: by us, or by the agent whose gate we replaced.
    owns_clsact: bool,
}

/// The loaded programs. Dropping them detaches XDP and leaves the gate, closed once the lease lapses.
pub struct Programs {
    ebpf: Ebpf,
    xdp: Vec<XdpLinkId>,
    gates: Vec<Gate>,
}

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs")
            .field("gates", &self.gates)
            .field("xdp_attached", &self.xdp.len())
            .finish_non_exhaustive()
    }
}

impl Programs {
    /// Loads the programs and makes their maps. Nothing is attached yet; the state is standby.
    ///
    /// # Errors
    /// Missing object, privilege or kernel feature; a program that the verifier refuses.
    pub fn load(params: LoadParams<'_>) -> Result<Self, BpfError> {
        if OBJECT.is_empty() {
            return Err(BpfError::ObjectMissing);
        }
        let vip = u32::from(params.vip);
        let port_maps = [
            (names::SERVICE_PORTS, params.service_ports, PRESENT),
            (names::SERVICE_PORTS, params.observed_ports, OBSERVED),
            (names::DATAGRAM_PORTS, params.datagram_ports, PRESENT),
        ];
        let room = |ports: &[u16]| u32::try_from(ports.len()).unwrap_or(u32::MAX).max(1);
        let (ifindex, source, egress) = match params.mirror {
            Some(mirror) => (mirror.ifindex, mirror.mac, mirror.egress),
            None => (0, [0; 6], MirrorEgress::Full),
        };
        let (source, egress) = (MirrorPeer::at(source).word(), egress as u32);
        let ack_gate = u32::from(params.guard.is_some());
        let own_ifindex = params.guard.map_or(0, |guard| guard.ifindex);
        let guarded = params.guard.map_or(1, |guard| guard.slots.max(1));
        let mut ebpf = EbpfLoader::new()
            .override_global(names::VIP, &vip, true)
            .override_global(names::MIRROR_IFINDEX, &ifindex, true)
            .override_global(names::MIRROR_SOURCE, &source, true)
            .override_global(names::MIRROR_EGRESS, &egress, true)
            .override_global(names::IFINDEX, &own_ifindex, true)
            .override_global(names::ACK_GATE, &ack_gate, true)
            .map_max_entries(names::GUARDED, guarded)
            .map_max_entries(names::CONFIRMED, guarded)
            .map_max_entries(names::SENT, guarded)
            .map_max_entries(names::DELEGATED, guarded)
            .map_max_entries(names::HOPS, guarded)
            .map_max_entries(names::FRAMES, params.frame_ring_bytes)
            .map_max_entries(names::LIVE_FLOWS, params.max_live_flows.max(1))
            .map_max_entries(names::SERVICE_PORTS, room(params.service_ports))
            .map_max_entries(names::DATAGRAM_PORTS, room(params.datagram_ports))
            .load(OBJECT)
            .map_err(|error| BpfError::new("loading the eBPF object", &error))?;

        for (name, ports, kind) in port_maps {
            let mut map: HashMap<_, u16, u8> = HashMap::try_from(map_mut(&mut ebpf, name)?)
                .map_err(|error| BpfError::new(format!("opening map {name}"), &error))?;
            for port in ports {
                map.insert(port, kind, 0)
                    .map_err(|error| BpfError::new(format!("filling map {name}"), &error))?;
            }
        }

        let mut programs = Self {
            ebpf,
            xdp: Vec::new(),
            gates: Vec::new(),
        };
        let loaded = programs.xdp_program()?.load();
        loaded.map_err(|error| BpfError::from_load(names::XDP, &error))?;
        for name in [names::GATE, names::MIRROR_PROGRAM, names::INGRESS] {
            let loaded = programs.tc_program(name)?.load();
            loaded.map_err(|error| BpfError::from_load(name, &error))?;
        }
        Ok(programs)
    }

    /// Puts the gate on an interface's egress, in place of one that a dead agent left there if there is
    /// one: the kernel swaps the program of the filter, so no packet finds the interface without a gate.
    ///
    /// # Errors
    /// No such interface, no privilege, or a filter of another kind at priority 1.
    pub fn attach_gate(&mut self, interface: &str) -> Result<(), BpfError> {
        let operation = || format!("attaching the gate to {interface}");
        let gate = self.tc_program(names::GATE)?;
        let attached = filter::attach(gate, interface, TcAttachType::Egress);
        let attached = attached.map_err(|error| filter_error(operation(), interface, &error))?;
        tracing::info!(interface, replaced = attached.replaced, "gate attached");
        self.gates.push(Gate {
            interface: interface.to_owned(),
            owns_clsact: attached.added_clsact || attached.replaced,
        });
        Ok(())
    }

    /// Puts the mirror on an interface's ingress, behind [`Programs::attach_gate`] on the same. Copies
    /// are made while the state is active within its lease and [`MirrorWriter`] names a standby. An ACK
    /// gate needs it with any tap, to hear of new connections.
    ///
    /// # Errors
    /// As [`Programs::attach_gate`].
    pub fn attach_mirror(&mut self, interface: &str) -> Result<(), BpfError> {
        let operation = || format!("attaching the mirror to {interface}");
        let mirror = self.tc_program(names::MIRROR_PROGRAM)?;
        let attached = filter::attach(mirror, interface, TcAttachType::Ingress);
        let attached = attached.map_err(|error| filter_error(operation(), interface, &error))?;
        tracing::info!(interface, replaced = attached.replaced, "mirror attached");
        Ok(())
    }

    /// Takes what a dead agent left on an interface's ingress, if there is something.
    ///
    /// # Errors
    /// No privilege.
    pub fn remove_mirror(&mut self, interface: &str) -> Result<(), BpfError> {
        leftover::remove_ingress(interface)
    }

    /// Catches what comes in on an interface, behind [`Programs::attach_gate`] on the same: in this mode,
    /// and by TC where the driver takes no XDP program.
    ///
    /// # Errors
    /// No such interface, no privilege, another XDP program on it, or neither mode works.
    pub fn attach_ingress(&mut self, interface: &str, mode: XdpMode) -> Result<XdpMode, BpfError> {
        let refused = match mode {
            XdpMode::Tc => None,
            XdpMode::Native => match self.attach_xdp(interface) {
                Ok(()) => return Ok(mode),
                Err(error @ BpfError::Failed { .. }) => Some(error),
                Err(error) => return Err(error),
            },
        };
        let operation = || format!("attaching TC ingress to {interface}");
        let ingress = self.tc_program(names::INGRESS)?;
        let attached = filter::attach(ingress, interface, TcAttachType::Ingress);
        let attached = attached.map_err(|error| filter_error(operation(), interface, &error))?;
        tracing::info!(
            interface,
            replaced = attached.replaced,
            "TC ingress attached"
        );
        if let Some(reason) = refused {
            tracing::warn!(
                interface,
                %reason,
                "the driver does not take the XDP program: TC catches the frames, which costs more CPU per frame"
            );
        }
        Ok(XdpMode::Tc)
    }

    fn attach_xdp(&mut self, interface: &str) -> Result<(), BpfError> {
        let Ok(index) = nix::net::if_::if_nametoindex(interface) else {
            return Err(interface_missing(interface));
        };
        let driver = AyaXdpMode::Driver;
        match self.xdp_program()?.attach_to_if_index(index, driver) {
            Ok(link) => {
                tracing::info!(interface, "XDP program attached");
                self.xdp.push(link);
                Ok(())
            }
            Err(error) => Err(match os_error(&error) {
                Some(libc::EBUSY | libc::EEXIST) => BpfError::XdpBusy {
                    interface: interface.to_owned(),
                    detail: error.to_string(),
                },
                Some(libc::ENODEV) => interface_missing(interface),
                _ => BpfError::new(format!("attaching XDP to {interface}"), &error),
            }),
        }
    }

    /// Takes everything off the interfaces: closes the gates, detaches XDP, then the filters, and the
    /// clsact qdisc where it was made for a gate and holds nobody else's filter. The VIP must be gone by
    /// now.
    ///
    /// # Errors
    /// The first failure; the later steps are tried all the same.
    pub async fn detach(mut self) -> Result<(), BpfError> {
        let mut result = self
            .state_map()
            .and_then(|state| state.write(NodeState::default()));
        for link in std::mem::take(&mut self.xdp) {
            let detached = self.xdp_program().and_then(|program| {
                let detached = program.take_link(link).and_then(|link| link.detach());
                detached.map_err(|error| BpfError::new("detaching XDP", &error))
            });
            result = result.and(detached);
        }
        for gate in std::mem::take(&mut self.gates) {
            let removed = leftover::remove_filters(&gate.interface, gate.owns_clsact).await;
            result = result.and(removed);
        }
        result
    }

    /// A writer of the node's state; each call gives one with a lock of its own.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn state_map(&self) -> Result<StateWriter, BpfError> {
        StateWriter::new(self.copy_of(names::STATE)?)
    }

    /// Tells the programs when the reader of the frame ring rests.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn rest(&self) -> Result<RestWriter, BpfError> {
        RestWriter::new(self.copy_of(names::REST)?)
    }

    /// A writer of whom the active copies to; each call gives one with a lock of its own.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn mirror(&self) -> Result<MirrorWriter, BpfError> {
        MirrorWriter::new(self.copy_of(names::MIRROR)?)
    }

    /// What agent and ACK gate tell each other; each call gives handles with locks of their own.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn guard_maps(&self) -> Result<GuardMaps, BpfError> {
        GuardMaps::new(
            self.copy_of(names::GUARD)?,
            self.copy_of(names::GUARDED)?,
            self.copy_of(names::CONFIRMED)?,
            self.copy_of(names::SENT)?,
            self.copy_of(names::DELEGATED)?,
            self.copy_of(names::HOPS)?,
            self.copy_of(names::PROMPT)?,
            self.copy_of(names::PROMPT_SEEN)?,
            AgreeMaps::new(
                self.copy_of(names::AGREE)?,
                self.copy_of(names::PROMISE)?,
                self.copy_of(names::PLEDGED)?,
                self.copy_of(names::PENDING)?,
                self.copy_of(names::SPARE_SLOTS)?,
            )?,
        )
    }

    /// What is pledged, in the memory of the programs.
    ///
    /// # Errors
    /// Where no file descriptor is left, or no memory.
    pub fn pledges(&self) -> Result<Words, BpfError> {
        let map = self.copy_of(names::PLEDGES)?;
        maps::words(names::PLEDGES, &map, pledge::WORDS).map(Words::new)
    }

    /// The sequence of the last prompt datagram that was made, in the memory of the programs.
    ///
    /// # Errors
    /// As [`Programs::pledges`].
    pub fn prompted(&self) -> Result<Words, BpfError> {
        let map = self.copy_of(names::PROMPTED)?;
        maps::words(names::PROMPTED, &map, 1).map(Words::new)
    }

    /// The flows that live on shadows.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn live_flows(&self) -> Result<LiveFlows, BpfError> {
        LiveFlows::new(self.copy_of(names::LIVE_FLOWS)?)
    }

    /// The flows whose FIN or RST may leave.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn approvals(&self) -> Result<Approvals, BpfError> {
        Approvals::new(self.copy_of(names::APPROVED_FLOWS)?)
    }

    /// The flows that lost a copy.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn lost_flows(&self) -> Result<LostFlows, BpfError> {
        LostFlows::new(self.copy_of(names::LOST_FLOWS)?)
    }

    /// The verdict counters of all programs.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn counters(&self) -> Result<Counters, BpfError> {
        Counters::new(
            self.copy_of(names::XDP_COUNTERS)?,
            self.copy_of(names::GATE_COUNTERS)?,
            self.copy_of(names::MIRROR_COUNTERS)?,
            self.copy_of(names::ACK_GATE_COUNTERS)?,
        )
    }

    /// The ring of heartbeats: entries are `HeartbeatEvent`. It has one reader.
    ///
    /// # Errors
    /// Where it was taken before.
    pub fn take_heartbeats(&mut self) -> Result<RingBuf<MapData>, BpfError> {
        self.take_ring(names::HEARTBEATS)
    }

    /// The ring of mirrored frames: entries are a `FrameHeader`, `len` bytes of frame, and padding that
    /// means nothing. It has one reader.
    ///
    /// # Errors
    /// Where it was taken before.
    pub fn take_frames(&mut self) -> Result<RingBuf<MapData>, BpfError> {
        self.take_ring(names::FRAMES)
    }

    /// The ring of held FINs and RSTs: entries are `HeldEvent`. It has one reader.
    ///
    /// # Errors
    /// Where it was taken before.
    pub fn take_held(&mut self) -> Result<RingBuf<MapData>, BpfError> {
        self.take_ring(names::HELD)
    }

    /// The ring of new connections, with an ACK gate: entries are `OpeningEvent`. It has one reader.
    ///
    /// # Errors
    /// Where it was taken before.
    pub fn take_openings(&mut self) -> Result<RingBuf<MapData>, BpfError> {
        self.take_ring(names::OPENINGS)
    }

    /// What the programs have to say; to be run as a task.
    ///
    /// # Errors
    /// Where it was taken before.
    pub fn take_log(&mut self) -> Result<ProgramLog, BpfError> {
        ProgramLog::new(&mut self.ebpf)
    }

    fn xdp_program(&mut self) -> Result<&mut Xdp, BpfError> {
        let program = self.ebpf.program_mut(names::XDP);
        program
            .and_then(|program| program.try_into().ok())
            .ok_or(BpfError::NotFound {
                kind: "program",
                name: names::XDP,
            })
    }

    fn tc_program(&mut self, name: &'static str) -> Result<&mut SchedClassifier, BpfError> {
        let program = self.ebpf.program_mut(name);
        program
            .and_then(|program| program.try_into().ok())
            .ok_or(BpfError::NotFound {
                kind: "program",
                name,
            })
    }

    fn copy_of(&self, name: &'static str) -> Result<Map, BpfError> {
        let map = self.ebpf.map(name);
        duplicate(name, map.ok_or(BpfError::NotFound { kind: "map", name })?)
    }

    fn take_ring(&mut self, name: &'static str) -> Result<RingBuf<MapData>, BpfError> {
        let map = self.ebpf.take_map(name);
        RingBuf::try_from(map.ok_or(BpfError::NotFound { kind: "map", name })?)
            .map_err(|error| BpfError::new(format!("opening ring {name}"), &error))
    }
}

fn filter_error(operation: String, interface: &str, error: &FilterError) -> BpfError {
    match os_error(error) {
        Some(libc::ENODEV) => interface_missing(interface),
        _ => BpfError::from_filter(operation, error),
    }
}

fn map_mut<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Map, BpfError> {
    ebpf.map_mut(name)
        .ok_or(BpfError::NotFound { kind: "map", name })
}

fn interface_missing(name: &str) -> BpfError {
    BpfError::InterfaceMissing {
        name: name.to_owned(),
        existing: crate::netif::interface_names(),
    }
}
