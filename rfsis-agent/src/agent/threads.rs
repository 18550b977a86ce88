//! The agent's two threads, and what they work with.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Context as _;
use rfsis_common::maps::State;
use rfsis_common::pledge::PLEDGES_MAX;
use tokio::sync::{mpsc, watch};

use crate::adopt::{Adopted, OpenFlows};
use crate::bpf::Programs;
use crate::carrier::CarrierWatch;
use crate::cli::{Fatal, Role};
use crate::config::{Config, Protect, Protocol, SyncConfig, Tap};
use crate::datagrams::{Datagrams, DatagramsConfig};
use crate::engine::{Engine, EngineHandle, FlowsTookOver, KernelEffects, Rest};
use crate::exchange::Exchange;
use crate::flows::{Flows, FlowsConfig};
use crate::guard::{Guard, GuardConfig};
use crate::handler::HandlerKind;
use crate::heartbeat::Codec;
use crate::link::{KernelGuard, Link};
use crate::metrics::{Metrics, Protection};
use crate::netif::Netif;
use crate::node::{Event, Node, NodeConfig};
use crate::pledge::{PLEDGED_FROM, Pledges};
use crate::pulse::{Notice, Pulse, PulseHandle};
use crate::relay::{Relay, RelayConfig};
use crate::services::{Connections, Snapshots};
use crate::shared::Shared;
use crate::sync::{Channel, Prompts};
use crate::sys::{PacketSocket, RawIpSocket};
use crate::warm::Warmer;
use crate::{engine, link, privileges, sys, tap};

/// Real-time priority of the heartbeat thread: above what hosts usually run so, below the kernel's
/// own threads (50 and up, and 99).
const HEARTBEAT_PRIORITY: i32 = 40;

/// The shadow thread must keep up with the wire, or copies are lost.
const ENGINE_NICE: i32 = -20;

pub(super) fn bind_sync(node: Ipv4Addr, port: u16) -> Result<UdpSocket, Fatal> {
    link::bind(node, port).map_err(|error| {
        let hint = "is another rfsis-agent running, or another program on this port? Choose another `sync_port` on both nodes";
        Fatal::Failed(anyhow::Error::from(error).context(format!("cannot listen on udp {node}:{port}; {hint}")))
    })
}

#[expect(
    clippy::too_many_arguments,
    reason = "all are made by the one caller, in this order"
)]
pub(super) fn make_link(
    config: &Config,
    own: usize,
    sync: &SyncConfig,
    socket: UdpSocket,
    session: u64,
    programs: &mut Programs,
    metrics: &Arc<Metrics>,
    (connections, snapshots): (Arc<Connections>, Snapshots),
) -> Result<Link, Fatal> {
    let (node, peer) = (config.nodes[own], config.nodes[1 - own]);
    metrics.protection.choose(Protection::Standby);
    let timeout = sync.timeout.as_nanos() as u64;
    let interval = config.heartbeat.interval.as_nanos() as u64;
    let guard = Guard::new(GuardConfig {
        vip: config.virtual_ip,
        timeout,
        max_flows: config.shadow.max_flows,
        idle_timeout: config.shadow.idle_timeout.as_nanos() as u64,
        copied: matches!(config.tap, Tap::Mirror(_)),
    });
    let channel = Channel::new(&config.key.0, &config.cluster, node, peer, session);
    let mut prompts = Prompts::new(&config.key.0, &config.cluster, node, peer, sync.port);
    prompts.share(programs.prompted()?);
    let mut exchange = Exchange::new(channel, prompts, session, guard, timeout, interval);
    exchange.pledges = Pledges::new(programs.pledges()?, PLEDGES_MAX, PLEDGED_FROM);
    Ok(Link {
        exchange,
        socket,
        peer: SocketAddrV4::new(peer, sync.port),
        gate: KernelGuard {
            maps: programs.guard_maps()?,
            socket: link::release_socket(&config.interface)
                .map_err(|error| lacks_raw(error, "a marked raw IP socket"))?,
            connections,
            metrics: Arc::clone(metrics),
            prompts: 0,
            prompts_counted: 0,
        },
        openings: programs.take_openings()?,
        snapshots,
        metrics: Arc::clone(metrics),
        prompted: 0,
    })
}

/// Waits for a thread without blocking the runtime.
pub(super) async fn join(thread: JoinHandle<()>) {
    let _ = tokio::task::spawn_blocking(move || thread.join()).await;
}

/// Starts a thread without which the node must not go on: if it panics the agent ends, and the peer
/// takes over.
pub(super) fn start_vital(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, Fatal> {
    struct EndOnPanic;
    impl Drop for EndOnPanic {
        fn drop(&mut self) {
            if std::thread::panicking() {
                std::process::abort();
            }
        }
    }
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let _guard = EndOnPanic;
            body();
        })
        .with_context(|| format!("cannot start thread {name}"))
        .map_err(Fatal::Failed)
}

#[expect(
    clippy::too_many_arguments,
    reason = "all are made by the one caller, in this order"
)]
pub(super) fn start_engine(
    config: &Config,
    netif: &Netif,
    tap: &Netif,
    programs: &mut Programs,
    metrics: &Arc<Metrics>,
    shared: &Arc<Shared>,
    link: Option<Link>,
    warmer: Warmer,
    took_over: mpsc::UnboundedSender<FlowsTookOver>,
    adopted: mpsc::Sender<Vec<Adopted>>,
    epoch: watch::Receiver<State>,
) -> Result<(EngineHandle, JoinHandle<()>), Fatal> {
    let services = |protocol| -> HashMap<u16, HandlerKind> {
        let services = config.services.iter();
        services
            .filter(|service| service.protocol == protocol)
            .map(|service| (service.port, service.handler))
            .collect()
    };
    let flows = Flows::new(FlowsConfig {
        vip: config.virtual_ip,
        services: services(Protocol::Tcp),
        max_flows: config.shadow.max_flows,
        max_bytes: config.shadow.max_bytes,
        idle_timeout: config.shadow.idle_timeout.as_nanos() as u64,
        mtu: netif.mtu as usize,
        guarded: matches!(config.protect, Protect::Sync(_)),
        copied: matches!(config.tap, Tap::Mirror(_)),
    })
    .map_err(anyhow::Error::from)?;
    let (handle, inbox) = engine::commands().context("cannot create an eventfd")?;
    let datagrams = DatagramsConfig {
        vip: config.virtual_ip,
        services: services(Protocol::Udp),
        window: config.udp_replay.as_nanos() as u64,
    };
    let engine = Engine {
        flows,
        datagrams: Datagrams::new(datagrams, metrics.datagrams_replayed.clone()),
        link,
        effects: KernelEffects {
            // What a live shadow says the ACK gate has no say in: a SYN-ACK that it held would never leave.
            socket: match config.protect {
                Protect::Sync(_) => link::release_socket(&config.interface),
                Protect::Async => RawIpSocket::open(&config.interface),
            }
            .map_err(|error| lacks_raw(error, "a raw IP socket"))?,
            approvals: programs.approvals()?,
            live_flows: programs.live_flows()?,
            warmer,
            adopted,
            released: Vec::new(),
            handed_over: Vec::new(),
            took: Vec::new(),
            open: OpenFlows::default(),
            epoch,
            metrics: Arc::clone(metrics),
        },
        source: tap::frame_source(config, tap),
        frames: programs.take_frames()?,
        rest: Rest::new(programs.rest()?),
        held: programs.take_held()?,
        lost: programs.lost_flows()?,
        relay: Relay::new(RelayConfig {
            mac: netif.mac,
            ifindex: netif.index,
            mtu: netif.mtu as usize,
            overheard: config.tap == Tap::Lan,
        }),
        lan: PacketSocket::open(netif.index)
            .map_err(|error| lacks_raw(error, "a packet socket"))?,
        inbox,
        metrics: Arc::clone(metrics),
        shared: Arc::clone(shared),
        gave_up: 0,
        took_over,
    };
    let thread = start_vital("rfsis-shadows", move || {
        if let Err(error) = sys::nice(ENGINE_NICE) {
            tracing::warn!(%error, "cannot raise the shadow thread's priority; copies may be lost under load; allow CAP_SYS_NICE");
        }
        privileges::while_running_or_abort();
        engine.run();
    })?;
    Ok((handle, thread))
}

pub(super) fn lacks_raw(error: io::Error, what: &str) -> Fatal {
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Fatal::Missing {
            what: format!("permission to open {what}"),
            remedy: "run as root or with CAP_NET_RAW".to_owned(),
        };
    }
    Fatal::Failed(anyhow::Error::from(error).context(format!("cannot open {what}")))
}

/// What the heartbeat thread talks to.
pub(super) struct Parts {
    pub(super) handle: PulseHandle,
    pub(super) orders: std::sync::mpsc::Receiver<Event>,
    pub(super) session: u64,
    pub(super) engine: EngineHandle,
    pub(super) services: watch::Sender<State>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) shared: Arc<Shared>,
    pub(super) notices: mpsc::UnboundedSender<Notice>,
}

pub(super) fn start_pulse(
    config: &Config,
    role: Role,
    own: usize,
    netif: &Netif,
    tap: &Netif,
    programs: &mut Programs,
    parts: Parts,
) -> Result<JoinHandle<()>, Fatal> {
    let node = Node::new(
        NodeConfig {
            role,
            node: config.nodes[own],
            peer: config.nodes[1 - own],
            mac: netif.mac,
            tap_mac: tap.mac,
            interval: config.heartbeat.interval,
            missed: config.heartbeat.missed,
            lease: config.heartbeat.lease,
            startup_grace: config.heartbeat.startup_grace,
            session: parts.session,
        },
        sys::monotonic(),
    );
    let pulse = Pulse {
        node,
        codec: Codec::new(&config.key.0, &config.cluster),
        interval: config.heartbeat.interval,
        peer: config.nodes[1 - own],
        vip: config.virtual_ip,
        mac: netif.mac,
        socket: PacketSocket::open(netif.index)
            .map_err(|error| lacks_raw(error, "a packet socket"))?,
        ring: programs.take_heartbeats()?,
        carrier: CarrierWatch::open(netif.index).context("cannot watch the interface's carrier")?,
        state: programs.state_map()?,
        mirror: match config.tap {
            Tap::Lan => None,
            Tap::Mirror(_) => Some(programs.mirror()?),
        },
        engine: parts.engine,
        services: parts.services,
        metrics: parts.metrics,
        shared: parts.shared,
        notices: parts.notices,
        orders: parts.orders,
    };
    let handle = parts.handle;
    start_vital("rfsis-heartbeat", move || {
        if let Err(error) = sys::real_time(HEARTBEAT_PRIORITY) {
            tracing::warn!(%error, "no real-time priority for heartbeats; a busy host may look dead; allow CAP_SYS_NICE");
        }
        privileges::while_running_or_abort();
        pulse.run(&handle);
    })
}
