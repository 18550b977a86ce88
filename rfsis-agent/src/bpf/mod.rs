//! The programs in the kernel: load, attach, ask, remove.
//!
//! The XDP program is held by a link and goes with the agent. The **gate** is a filter on clsact egress,
//! attached by netlink with a fixed priority and handle: it outlives the agent, however that ends, and
//! stays closed since nobody renews its lease. The next agent replaces it in place.
//!
//! Order of a start: [`Programs::load`] (state standby, so the gate is closed), [`Programs::attach_gate`],
//! [`Programs::attach_xdp`], only then the VIP is configured. Order of a stop: the VIP is removed, then
//! [`Programs::detach`].

mod error;
mod leftover;
mod log;
mod maps;

use std::fmt;
use std::net::Ipv4Addr;

use aya::maps::{HashMap, Map, MapData, RingBuf};
use aya::programs::links::Link as _;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::xdp::{XdpLinkId, XdpMode as AyaXdpMode};
use aya::programs::{SchedClassifier, TcAttachType, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use rfsis_common::maps::{NodeState, PRESENT, names};
use serde::{Deserialize, Serialize};

pub use error::BpfError;
pub use leftover::cleanup;
pub use log::ProgramLog;
pub use maps::{Approvals, Counters, GateCounters, LiveFlows, LostFlows, StateWriter, XdpCounters};

use error::os_error;
use maps::duplicate;

/// The compiled programs; empty where the agent was built without them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/rfsis-ebpf.o"));

/// Before all other filters of the host: one that ends the classification in front of the gate would
/// let packets past it.
const GATE_PRIORITY: u16 = 1;

/// "RF": one fixed place, so that a gate is replaced and never stacked.
const GATE_HANDLE: TcHandle = TcHandle::new(0x5246, 1);

/// What is fixed when the programs are loaded.
#[derive(Clone, Copy, Debug)]
pub struct LoadParams<'a> {
    /// The virtual IP.
    pub vip: Ipv4Addr,
    /// TCP ports of the services, whose FIN and RST the gate holds.
    pub service_ports: &'a [u16],
    /// UDP ports of the services, whose ICMP port unreachable the gate holds.
    pub datagram_ports: &'a [u16],
    /// Size of the frame ring, bytes; made a power of two.
    pub frame_ring_bytes: u32,
    /// Flows that may live on shadows at once.
    pub max_live_flows: u32,
}

/// How the XDP program is attached.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// In the driver, before a socket buffer is made.
    Native,
    /// In the kernel's receive path, for drivers without XDP.
    Generic,
}

impl XdpMode {
    /// Both modes.
    pub const ALL: [XdpMode; 2] = [XdpMode::Native, XdpMode::Generic];

    /// The word used in logs, metrics and `status`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

/// A gate that this process attached.
#[derive(Debug)]
struct Gate {
    interface: String,
    /// The qdisc was made for the gate: by us, or by the agent whose gate we replaced.
    owns_clsact: bool,
}

/// The loaded programs. Dropping them detaches XDP and leaves the gate, closed once the lease lapses.
pub struct Programs {
    ebpf: Ebpf,
    xdp: Option<XdpLinkId>,
    gate: Option<Gate>,
}

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs")
            .field("gate", &self.gate)
            .field("xdp_attached", &self.xdp.is_some())
            .finish_non_exhaustive()
    }
}

impl Programs {
    /// Loads both programs and makes their maps. Nothing is attached yet; the state is standby.
    ///
    /// # Errors
    /// Missing object, privilege or kernel feature; a program that the verifier refuses.
    pub fn load(params: LoadParams<'_>) -> Result<Self, BpfError> {
        if OBJECT.is_empty() {
            return Err(BpfError::ObjectMissing);
        }
        let vip = u32::from(params.vip);
        let port_maps = [
            (names::SERVICE_PORTS, params.service_ports),
            (names::DATAGRAM_PORTS, params.datagram_ports),
        ];
        let room = |ports: &[u16]| u32::try_from(ports.len()).unwrap_or(u32::MAX).max(1);
        let mut ebpf = EbpfLoader::new()
            .override_global(names::VIP, &vip, true)
            .map_max_entries(names::FRAMES, params.frame_ring_bytes)
            .map_max_entries(names::LIVE_FLOWS, params.max_live_flows.max(1))
            .map_max_entries(names::SERVICE_PORTS, room(params.service_ports))
            .map_max_entries(names::DATAGRAM_PORTS, room(params.datagram_ports))
            .load(OBJECT)
            .map_err(|error| BpfError::new("loading the eBPF object", &error))?;

        for (name, ports) in port_maps {
            let mut map: HashMap<_, u16, u8> = HashMap::try_from(map_mut(&mut ebpf, name)?)
                .map_err(|error| BpfError::new(format!("opening map {name}"), &error))?;
            for port in ports {
                map.insert(port, PRESENT, 0)
                    .map_err(|error| BpfError::new(format!("filling map {name}"), &error))?;
            }
        }

        let mut programs = Self {
            ebpf,
            xdp: None,
            gate: None,
        };
        let loaded = programs.xdp_program()?.load();
        loaded.map_err(|error| BpfError::from_load(names::XDP, &error))?;
        let loaded = programs.gate_program()?.load();
        loaded.map_err(|error| BpfError::from_load(names::GATE, &error))?;
        Ok(programs)
    }

    /// Puts the gate on an interface's egress, in place of one that a dead agent left there if there is
    /// one: the kernel swaps the program of the filter, so no packet finds the interface without a gate.
    ///
    /// # Errors
    /// No such interface, no privilege, or a filter of another kind at priority 1.
    pub fn attach_gate(&mut self, interface: &str) -> Result<(), BpfError> {
        let operation = || format!("attaching the gate to {interface}");
        let added_clsact = match qdisc_add_clsact(interface) {
            Ok(()) => true,
            Err(error) => match os_error(&error) {
                Some(libc::EEXIST) => false,
                Some(libc::ENODEV) => return Err(interface_missing(interface)),
                _ => return Err(BpfError::new(operation(), &error)),
            },
        };
        let attached = if added_clsact {
            self.create_gate(interface).map(|()| false)
        } else {
            self.replace_gate(interface)
        };
        match attached {
            Ok(replaced) => {
                tracing::info!(interface, replaced, "gate attached");
                self.gate = Some(Gate {
                    interface: interface.to_owned(),
                    owns_clsact: added_clsact || replaced,
                });
                Ok(())
            }
            Err(error) => Err(BpfError::new(operation(), &error)),
        }
    }

    fn create_gate(&mut self, interface: &str) -> Result<(), GateError> {
        let program = self.gate_program()?;
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: GATE_PRIORITY,
            handle: GATE_HANDLE,
            classid: None,
        });
        let id = program.attach_with_options(interface, TcAttachType::Egress, options)?;
        // Dropped, the link would take the gate with it.
        std::mem::forget(program.take_link(id)?);
        Ok(())
    }

    /// `true` where a gate was there and was replaced.
    fn replace_gate(&mut self, interface: &str) -> Result<bool, GateError> {
        let place = SchedClassifierLink::attached(
            interface,
            TcAttachType::Egress,
            GATE_PRIORITY,
            GATE_HANDLE,
            None,
        )
        .map_err(TcError::IoError)?;
        let program = self.gate_program()?;
        // RTM_NEWTFILTER without NLM_F_CREATE: `cls_bpf_change` swaps the program of the filter.
        match program.attach_to_link(place) {
            Ok(id) => {
                std::mem::forget(program.take_link(id)?);
                Ok(true)
            }
            Err(error) if os_error(&error) == Some(libc::ENOENT) => {
                self.create_gate(interface).map(|()| false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Attaches the XDP program: native mode first, then generic.
    ///
    /// # Errors
    /// No such interface, no privilege, another XDP program on it, or neither mode works.
    pub fn attach_xdp(&mut self, interface: &str) -> Result<XdpMode, BpfError> {
        let native = match self.attach_xdp_as(interface, XdpMode::Native) {
            Ok(()) => return Ok(XdpMode::Native),
            Err(error @ BpfError::Failed { .. }) => error,
            Err(error) => return Err(error),
        };
        self.attach_xdp_as(interface, XdpMode::Generic)?;
        tracing::warn!(
            interface,
            reason = %native,
            "the driver does not take the XDP program: generic mode is used, which costs more CPU per frame"
        );
        Ok(XdpMode::Generic)
    }

    /// Attaches the XDP program in one mode.
    ///
    /// # Errors
    /// As [`Programs::attach_xdp`].
    pub fn attach_xdp_as(&mut self, interface: &str, mode: XdpMode) -> Result<(), BpfError> {
        let Ok(index) = nix::net::if_::if_nametoindex(interface) else {
            return Err(interface_missing(interface));
        };
        let aya_mode = match mode {
            XdpMode::Native => AyaXdpMode::Driver,
            XdpMode::Generic => AyaXdpMode::Skb,
        };
        match self.xdp_program()?.attach_to_if_index(index, aya_mode) {
            Ok(link) => {
                tracing::info!(interface, mode = mode.as_str(), "XDP program attached");
                self.xdp = Some(link);
                Ok(())
            }
            Err(error) => Err(match os_error(&error) {
                Some(libc::EBUSY | libc::EEXIST) => BpfError::XdpBusy {
                    interface: interface.to_owned(),
                    detail: error.to_string(),
                },
                Some(libc::ENODEV) => interface_missing(interface),
                _ => BpfError::new(
                    format!("attaching XDP to {interface} in {} mode", mode.as_str()),
                    &error,
                ),
            }),
        }
    }

    /// Takes everything off the interface: closes the gate, detaches XDP, then the gate, and the clsact
    /// qdisc where it was made for the gate and holds nobody else's filter. The VIP must be gone by now.
    ///
    /// # Errors
    /// The first failure; the later steps are tried all the same.
    pub async fn detach(mut self) -> Result<(), BpfError> {
        let closed = self
            .state_map()
            .and_then(|state| state.write(NodeState::default()));
        let xdp = match self.xdp.take() {
            Some(link) => self.xdp_program().and_then(|program| {
                let detached = program.take_link(link).and_then(|link| link.detach());
                detached.map_err(|error| BpfError::new("detaching XDP", &error))
            }),
            None => Ok(()),
        };
        let gate = match self.gate.take() {
            Some(gate) => leftover::remove_gate(&gate.interface, gate.owns_clsact).await,
            None => Ok(()),
        };
        closed.and(xdp).and(gate)
    }

    /// A writer of the node's state; each call gives one with a lock of its own.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn state_map(&self) -> Result<StateWriter, BpfError> {
        StateWriter::new(self.copy_of(names::STATE)?)
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

    /// The verdict counters of both programs.
    ///
    /// # Errors
    /// Where no file descriptor is left.
    pub fn counters(&self) -> Result<Counters, BpfError> {
        Counters::new(
            self.copy_of(names::XDP_COUNTERS)?,
            self.copy_of(names::GATE_COUNTERS)?,
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

    /// What the programs have to say; to be run as a task.
    ///
    /// # Errors
    /// Where it was taken before.
    pub fn take_log(&mut self) -> Result<ProgramLog, BpfError> {
        ProgramLog::new(&mut self.ebpf)
    }

    /// Runs the XDP program on a frame that is nobody's (`BPF_PROG_TEST_RUN`), with all its effects on
    /// maps; gives its `xdp_action`.
    ///
    /// # Errors
    /// EINVAL for frames below 14 bytes.
    pub fn test_xdp(&mut self, frame: &[u8]) -> Result<u32, BpfError> {
        let options = TestRunOptions {
            data_in: Some(frame),
            ..TestRunOptions::default()
        };
        let result = self.xdp_program()?.test_run(options);
        result
            .map(|result| result.return_value)
            .map_err(|error| BpfError::new("test run of the XDP program", &error))
    }

    /// The same for the gate; gives its `TC_ACT_` code.
    ///
    /// # Errors
    /// As [`Programs::test_xdp`].
    pub fn test_gate(&mut self, frame: &[u8]) -> Result<i32, BpfError> {
        let options = TestRunOptions {
            data_in: Some(frame),
            ..TestRunOptions::default()
        };
        let result = self.gate_program()?.test_run(options);
        result
            .map(|result| result.return_value.cast_signed())
            .map_err(|error| BpfError::new("test run of the gate", &error))
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

    fn gate_program(&mut self) -> Result<&mut SchedClassifier, BpfError> {
        let program = self.ebpf.program_mut(names::GATE);
        program
            .and_then(|program| program.try_into().ok())
            .ok_or(BpfError::NotFound {
                kind: "program",
                name: names::GATE,
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

/// Either kind of error on the way to an attached gate.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
enum GateError {
    Bpf(#[from] BpfError),
    Program(#[from] aya::programs::ProgramError),
    Tc(#[from] TcError),
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
