//! Start, stop, and who talks to whom.
//!
//! ```text
//!  start:  control socket, metrics port ─► load ─► gate (closed), mirror ─► XDP (standby) ─► VIP
//!          ─► service sockets ─► shadow thread, heartbeat thread ─► run
//!  stop:   gate closed ─► service sockets aborted ─► VIP removed ─► XDP, mirror, gate detached
//! ```
//!
//! The order is the point: there is never a moment in which the VIP is configured and the gate is
//! not attached.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use rfsis_common::maps::{FlowKey, State};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::adopt::{Adopted, OpenFlows};
use crate::bpf::{self, Approvals, BpfError, Counters, GuardParams, LoadParams, Programs, XdpMode};
use crate::cli::{Fatal, Role};
use crate::config::{Config, Protect, Protocol, SyncConfig, Tap};
use crate::control::{
    self, Failover, FlowCounts, Peer, ProtectionStatus, Request, Response, Status,
};
use crate::datagrams::{Datagrams, DatagramsConfig};
use crate::engine::{self, Command, Engine, EngineHandle, FlowsTookOver, KernelEffects, Rest};
use crate::flows::{Flows, FlowsConfig};
use crate::guard::{Guard, GuardConfig};
use crate::handler::{HandlerKind, Output};
use crate::heartbeat::Codec;
use crate::link::{self, KernelGuard, Link};
use crate::metrics::{self, GuardCondition, HeartbeatReceived, Metrics, Protection, Ring};
use crate::netif::{Netif, NetifError, VipAddress};
use crate::node::{Event, Fact, Node, NodeConfig, TakeoverReason};
use crate::privileges;
use crate::pulse::{Notice, Pulse, PulseHandle, Takeover};
use crate::redundancy::{self, Redundancy, age};
use crate::relay::{Relay, RelayConfig};
use crate::services::{Connections, FlowGate, Services, Snapshots};
use crate::shared::Shared;
use crate::sockets::{VipSockets, destroy_stale};
use crate::switchover::Switchover;
use crate::sync::Channel;
use crate::sys::{self, PacketSocket, RawIpSocket};
use crate::tap;
use crate::warm::{Warmer, keep_warm, warmer};
use rfsis_common::ack_gate::AckGateVerdict;
use rfsis_common::mirror::MirrorVerdict;
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

/// Real-time priority of the heartbeat thread: above what hosts usually run so, below the kernel's
/// own threads (50 and up, and 99).
const HEARTBEAT_PRIORITY: i32 = 40;

/// The shadow thread must keep up with the wire, or copies are lost.
const ENGINE_NICE: i32 = -20;

/// After a handover an agent that ends waits so long, for what still comes to it: frames of clients that
/// have just been told of the new owner.
const LINGER: Duration = Duration::from_millis(100);

/// What the heartbeat thread reports is kept so far for those who wait for it.
const FACTS: usize = 256;

/// Failovers that `status` remembers.
const HISTORY: usize = 16;

/// How long ago the peer may have been heard for the node to call itself ready, at least.
const READY_SILENCE: Duration = Duration::from_secs(1);

impl From<BpfError> for Fatal {
    fn from(error: BpfError) -> Self {
        exit_with(error.exit_code(), error)
    }
}

impl From<NetifError> for Fatal {
    fn from(error: NetifError) -> Self {
        exit_with(error.exit_code(), error)
    }
}

/// Only the host tells that the config does not fit it, so these are found after parsing.
fn exit_with(code: u8, error: impl std::error::Error + Send + Sync + 'static) -> Fatal {
    match code {
        2 => Fatal::Unfit(error.into()),
        3 => Fatal::Unable(error.into()),
        _ => Fatal::Failed(error.into()),
    }
}

/// Runs the agent in the foreground until SIGTERM or SIGINT.
///
/// # Errors
/// See [`Fatal`].
pub fn run(config: Config, role: Role) -> Result<(), Fatal> {
    privileges::at_start()?;
    sys::map_large_buffers();
    runtime()?.block_on(run_until_stopped(config, role))
}

/// Removes what a crashed agent left: VIP first, because until then only the gate is silent.
///
/// # Errors
/// See [`Fatal`].
pub fn cleanup(config: &Config) -> Result<(), Fatal> {
    runtime()?.block_on(async {
        let netif = Netif::new(&config.interface).await?;
        if netif.remove_vip_if_ours(config.virtual_ip).await? {
            tracing::info!(vip = %config.virtual_ip, "removed the VIP");
        }
        for interface in config.interfaces() {
            bpf::cleanup(interface).await?;
            tracing::info!(interface, "programs detached");
        }
        Ok(())
    })
}

fn runtime() -> Result<tokio::runtime::Runtime, Fatal> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        // What the start needs beyond that is done by the first thread.
        .on_thread_start(privileges::while_running_or_abort)
        .build()
        .context("cannot start the async runtime")
        .map_err(Fatal::Failed)
}

async fn run_until_stopped(config: Config, role: Role) -> Result<(), Fatal> {
    // Everything that can be refused without touching the network comes first.
    let netif = Netif::new(&config.interface).await?;
    let own = netif.own_node(&config.nodes).await?;
    netif.check_vip(config.virtual_ip)?;
    let tap = tap::interface(&config, &netif).await?;
    let sync_socket = match &config.protect {
        Protect::Async => None,
        Protect::Sync(sync) => Some(bind_sync(config.nodes[own], sync.port)?),
    };
    let control = control::bind(&config.control).map_err(anyhow::Error::from)?;
    let metrics_port = metrics::bind(config.metrics)
        .await
        .map_err(anyhow::Error::from)?;
    let mut stop = stop_signals()?;

    let observed: Vec<u16> = config
        .services
        .iter()
        .filter(|service| service.protocol == Protocol::Tcp)
        .filter(|service| service.handler.output() == Output::Observed)
        .map(|service| service.port)
        .collect();
    let mut programs = Programs::load(LoadParams {
        vip: config.virtual_ip,
        service_ports: &ports(&config, Protocol::Tcp),
        observed_ports: &observed,
        datagram_ports: &ports(&config, Protocol::Udp),
        frame_ring_bytes: config.shadow.ring_bytes,
        // Handshakes under way are there too.
        max_live_flows: (config.shadow.max_flows + crate::flows::MAX_OPENINGS) as u32,
        mirror: tap::mirror_params(&config, &tap),
        guard: match config.protect {
            Protect::Async => None,
            Protect::Sync(_) => Some(GuardParams {
                max_flows: config.shadow.max_flows as u32,
            }),
        },
    })?;
    programs.attach_gate(&config.interface)?;
    let result = attach_and_serve(
        &config,
        role,
        own,
        &netif,
        &tap,
        &mut programs,
        sync_socket,
        control,
        metrics_port,
        &mut stop,
    )
    .await;
    // However it ended, the host is left as it was found.
    let removed = netif.remove_vip_if_ours(config.virtual_ip).await;
    let detached = programs.detach().await;
    result?;
    removed?;
    detached?;
    Ok(())
}

fn ports(config: &Config, protocol: Protocol) -> Vec<u16> {
    let services = config.services.iter();
    services
        .filter(|service| service.protocol == protocol)
        .map(|service| service.port)
        .collect()
}

fn stop_signals() -> Result<mpsc::Receiver<&'static str>, Fatal> {
    let (sender, receiver) = mpsc::channel(1);
    for (kind, name) in [
        (SignalKind::terminate(), "SIGTERM"),
        (SignalKind::interrupt(), "SIGINT"),
    ] {
        let mut signal = signal(kind).context("cannot listen for signals")?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while signal.recv().await.is_some() {
                let _ = sender.send(name).await;
            }
        });
    }
    Ok(receiver)
}

#[expect(
    clippy::too_many_arguments,
    reason = "all are made by the one caller, in this order"
)]
async fn attach_and_serve(
    config: &Config,
    role: Role,
    own: usize,
    netif: &Netif,
    tap: &Netif,
    programs: &mut Programs,
    sync_socket: Option<UdpSocket>,
    control: std::os::unix::net::UnixListener,
    metrics_port: TcpListener,
    stop: &mut mpsc::Receiver<&'static str>,
) -> Result<(), Fatal> {
    tap::attach(config, tap, programs)?;
    let mode = config.xdp.unwrap_or(netif.xdp_mode);
    let xdp_mode = programs.attach_ingress(&config.interface, mode)?;
    if netif.add_vip(config.virtual_ip, config.prefix_len).await? == VipAddress::AlreadyThere {
        tracing::info!(vip = %config.virtual_ip, "the VIP is already configured");
    }
    let sockets = VipSockets {
        vip: config.virtual_ip,
        ports: ports(config, Protocol::Tcp),
    };
    let (services_state, state) = watch::channel(State::Standby);
    // A socket that a killed agent was just adopting may not allow its address to be used again. The gate is
    // closed: nobody hears of its end.
    if let Err(error) = sockets.destroy(&mut state.clone()).await {
        tracing::debug!(%error, "stale sockets stay until they end by themselves");
    }
    let services = Services::bind(config.virtual_ip, &config.services)?;

    if let Err(error) = sys::raise_open_files() {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    if let Err(error) = sys::lock_memory() {
        tracing::warn!(%error, "cannot lock memory; a page fault may delay a heartbeat; allow it without limit (LimitMEMLOCK=infinity), or CAP_IPC_LOCK");
    }

    let metrics =
        Arc::new(Metrics::new(env!("CARGO_PKG_VERSION")).context("cannot register the metrics")?);
    metrics.xdp_mode.choose(xdp_mode);
    for reason in TakeoverReason::FAILOVERS {
        metrics.failovers.with_label_values(&[reason.as_str()]);
    }
    metrics.heartbeat_age.set(f64::NAN);
    let shared = Arc::new(Shared::default());
    let (pulse, orders) = PulseHandle::new().context("cannot create an eventfd")?;
    let redundancy = Arc::new(Redundancy::new(
        Arc::clone(&shared),
        Arc::clone(&metrics),
        pulse.clone(),
        sockets.clone(),
        match config.protect {
            Protect::Async => None,
            Protect::Sync(_) => Some(programs.guard_maps()?),
        },
    ));
    let story = Arc::new(Story::new(
        config,
        role,
        own,
        xdp_mode,
        &shared,
        &metrics,
        &redundancy,
    ));
    let (reports, _) = broadcast::channel(FACTS);
    let switchover = Arc::new(Switchover::new(
        pulse.clone(),
        reports.clone(),
        Arc::clone(&shared),
        Arc::clone(&metrics),
        Arc::clone(&redundancy),
        config.heartbeat.takeover_time(),
    ));
    let cancel = CancellationToken::new();
    let mut tasks = JoinSet::new();

    tasks.spawn(destroy_stale(sockets, state.clone()));
    let approvals = Arc::new(programs.approvals()?);
    let (connections, snapshots) = Connections::new().context("cannot create an eventfd")?;
    // One batch waits while one is begun with.
    let (adopted, to_adopt) = mpsc::channel(1);
    let epoch = state.clone();
    let served = tokio::spawn(services.run(
        state,
        to_adopt,
        approvals as Arc<dyn FlowGate>,
        Arc::clone(&connections),
        Arc::clone(&metrics),
        cancel.clone(),
    ));

    let (warmer, to_warm) = warmer();
    tasks.spawn(keep_warm(netif.clone(), to_warm));
    let (took_over, flows_took_over) = mpsc::unbounded_channel();
    // 0 stands for "no session" on the wire.
    let session = getrandom::u64()
        .context("cannot get a random number")?
        .max(1);
    let link = match (&config.protect, sync_socket) {
        (Protect::Sync(sync), Some(socket)) => Some(make_link(
            config,
            own,
            sync,
            socket,
            session,
            programs,
            &metrics,
            (connections, snapshots),
        )?),
        _ => {
            metrics.protection.choose(Protection::Async);
            None
        }
    };
    let (engine, engine_thread) = start_engine(
        config, netif, tap, programs, &metrics, &shared, link, warmer, took_over, adopted, epoch,
    )?;
    let (notices, facts) = mpsc::unbounded_channel();
    let pulse_thread = start_pulse(
        config,
        role,
        own,
        netif,
        tap,
        programs,
        Parts {
            handle: pulse.clone(),
            orders,
            session,
            engine: engine.clone(),
            services: services_state,
            metrics: Arc::clone(&metrics),
            shared: Arc::clone(&shared),
            notices,
        },
    )?;

    tasks.spawn(tell(
        facts,
        flows_took_over,
        Arc::clone(&story),
        reports,
        Arc::clone(&switchover),
    ));
    tasks.spawn(watch_redundancy(
        Arc::clone(&story),
        Arc::clone(&switchover),
        config.preempt,
    ));
    let log = programs.take_log()?;
    tasks.spawn(async move {
        if let Err(error) = log.run().await {
            tracing::warn!(%error, "the programs' log cannot be read");
        }
    });
    let (asked, mover) = (Arc::clone(&story), Arc::clone(&switchover));
    tasks.spawn(control::serve(
        control,
        move |request| answer(Arc::clone(&asked), Arc::clone(&mover), request),
        cancel.clone(),
    ));
    let readiness = Arc::clone(&story);
    tasks.spawn(metrics::serve(
        metrics_port,
        Arc::clone(&metrics),
        scrape_hook(programs.counters()?, Arc::clone(&story)),
        Arc::new(move || readiness.ready()),
        cancel.clone(),
    ));
    privileges::while_running()?;
    tracing::info!(
        node = %config.nodes[own],
        role = role.as_str(),
        vip = %config.virtual_ip,
        interface = config.interface,
        xdp_mode = xdp_mode.as_str(),
        "running"
    );

    let signal = stop.recv().await.unwrap_or("end of signals");
    tracing::info!(signal, "stopping");
    if story.shared.node().state == State::Active {
        match switchover.leave().await {
            Ok(()) => tokio::time::sleep(LINGER).await,
            Err(refused) => tracing::warn!("ending without a handover: {refused}"),
        }
    }
    pulse.stop();
    join(pulse_thread).await;
    cancel.cancel();
    let _ = served.await;
    engine.send(Command::Stop);
    join(engine_thread).await;
    tasks.shutdown().await;
    Ok(())
}

fn bind_sync(node: Ipv4Addr, port: u16) -> Result<UdpSocket, Fatal> {
    link::bind(node, port).map_err(|error| {
        let hint = "is another rfsis-agent running, or another program on this port? Choose another `sync_port` on both nodes";
        Fatal::Failed(anyhow::Error::from(error).context(format!("cannot listen on udp {node}:{port}; {hint}")))
    })
}

#[expect(
    clippy::too_many_arguments,
    reason = "all are made by the one caller, in this order"
)]
fn make_link(
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
    Ok(Link {
        channel: Channel::new(&config.key.0, &config.cluster, node, peer, session),
        socket,
        peer: SocketAddrV4::new(peer, sync.port),
        guard: Guard::new(GuardConfig {
            vip: config.virtual_ip,
            timeout: sync.timeout.as_nanos() as u64,
            max_flows: config.shadow.max_flows,
            idle_timeout: config.shadow.idle_timeout.as_nanos() as u64,
            copied: matches!(config.tap, Tap::Mirror(_)),
        }),
        gate: KernelGuard {
            maps: programs.guard_maps()?,
            socket: link::release_socket(&config.interface)
                .map_err(|error| lacks_raw(error, "a marked raw IP socket"))?,
            connections,
            metrics: Arc::clone(metrics),
        },
        openings: programs.take_openings()?,
        snapshots,
        metrics: Arc::clone(metrics),
        peer_session: None,
        records: Vec::new(),
        asked_at: 0,
        timeout: sync.timeout.as_nanos() as u64,
    })
}

/// Waits for a thread without blocking the runtime.
async fn join(thread: JoinHandle<()>) {
    let _ = tokio::task::spawn_blocking(move || thread.join()).await;
}

/// Starts a thread without which the node must not go on: if it panics the agent ends, and the peer
/// takes over.
fn start_vital(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Fatal> {
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
fn start_engine(
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
            socket: RawIpSocket::open(&config.interface)
                .map_err(|error| lacks_raw(error, "a raw IP socket"))?,
            approvals: programs.approvals()?,
            live_flows: programs.live_flows()?,
            warmer,
            adopted,
            handed_over: Vec::new(),
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

fn lacks_raw(error: io::Error, what: &str) -> Fatal {
    if error.kind() == io::ErrorKind::PermissionDenied {
        return Fatal::Missing {
            what: format!("permission to open {what}"),
            remedy: "run as root or with CAP_NET_RAW".to_owned(),
        };
    }
    Fatal::Failed(anyhow::Error::from(error).context(format!("cannot open {what}")))
}

/// What the heartbeat thread talks to.
struct Parts {
    handle: PulseHandle,
    orders: std::sync::mpsc::Receiver<Event>,
    session: u64,
    engine: EngineHandle,
    services: watch::Sender<State>,
    metrics: Arc<Metrics>,
    shared: Arc<Shared>,
    notices: mpsc::UnboundedSender<Notice>,
}

fn start_pulse(
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

impl FlowGate for Approvals {
    fn approve(&self, flow: FlowKey) -> io::Result<()> {
        Approvals::approve(self, flow).map_err(io::Error::other)
    }

    fn revoke(&self, flow: FlowKey) -> io::Result<()> {
        Approvals::revoke(self, &flow).map_err(io::Error::other)
    }
}

/// Logs and remembers what the threads have to say.
async fn tell(
    mut notices: mpsc::UnboundedReceiver<Notice>,
    mut flows: mpsc::UnboundedReceiver<FlowsTookOver>,
    story: Arc<Story>,
    reports: broadcast::Sender<Fact>,
    switchover: Arc<Switchover>,
) {
    // Ends with this task.
    let mut grants = JoinSet::new();
    loop {
        tokio::select! {
            Some(notice) = notices.recv() => match notice {
                Notice::Fact(fact) => {
                    log(&fact);
                    // Nobody may be waiting.
                    let _ = reports.send(fact);
                }
                Notice::Wished(wish) => {
                    while grants.try_join_next().is_some() {}
                    let switchover = Arc::clone(&switchover);
                    grants.spawn(async move { switchover.grant(wish).await });
                }
                Notice::TookOver(takeover) => story.took_over(&takeover),
                Notice::Mirrors(peer) if peer.is_nobody() => {
                    tracing::warn!("no standby is heard: the VIP's frames are not copied");
                }
                Notice::Mirrors(peer) => {
                    let [a, b, c, d, e, f] = peer.mac();
                    let standby = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
                    tracing::info!(standby, "copying the VIP's frames");
                }
                Notice::MirrorNotWritten => {
                    tracing::error!("the kernel refused to be told whom to copy the VIP's frames to");
                }
                Notice::StateNotWritten => {
                    tracing::error!("the kernel refused the state; the gate closes with its lease");
                }
            },
            Some(flows) = flows.recv() => {
                let FlowsTookOver { report, duration } = flows;
                tracing::info!(
                    live = report.live,
                    spoke = report.spoke,
                    resets = ?report.resets,
                    duration = ?Duration::from_nanos(duration),
                    "shadows are live"
                );
            }
            else => return,
        }
    }
}

/// Looks again and again whether the pair is redundant. A primary with `preempt` that has been a ready
/// standby for so long asks for the VIP.
async fn watch_redundancy(
    story: Arc<Story>,
    switchover: Arc<Switchover>,
    preempt: Option<Duration>,
) {
    let mut ready_since = None;
    let mut looks = tokio::time::interval(redundancy::LOOK);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        story.redundancy.look(false).await;
        let ready = story.ready().is_ok();
        story.redundancy.note(ready);
        let node = story.shared.node();
        let prefers = story.role == Role::Primary
            && node.state == State::Standby
            && node.peer.is_some_and(|peer| peer.role == Role::Backup);
        ready_since = (ready && prefers).then(|| ready_since.unwrap_or_else(Instant::now));
        if let (Some(preempt), Some(since)) = (preempt, ready_since)
            && since.elapsed() >= preempt
        {
            tracing::info!(?preempt, "asking for the VIP, as the primary that is ready");
            if let Err(refused) = switchover.switch(false).await {
                tracing::warn!("the VIP stays with the backup: {refused}");
            }
            ready_since = None;
        }
    }
}

async fn answer(story: Arc<Story>, switchover: Arc<Switchover>, request: Request) -> Response {
    match request {
        Request::Status => Response::Status(Box::new(story.status())),
        Request::Switchover { force } => match switchover.switch(force).await {
            Ok(()) => Response::Done,
            Err(refused) => Response::Refused {
                reason: format!("switchover: {refused}"),
            },
        },
    }
}

fn log(fact: &Fact) {
    match fact.level() {
        tracing::Level::ERROR => tracing::error!("{fact}"),
        tracing::Level::WARN => tracing::warn!("{fact}"),
        _ => tracing::info!("{fact}"),
    }
}

/// Kernel counters are read when somebody looks.
fn scrape_hook(counters: Counters, story: Arc<Story>) -> metrics::ScrapeHook {
    Arc::new(move |metrics: &Metrics| {
        if let Ok(xdp) = counters.xdp() {
            for (verdict, count) in xdp.iter() {
                metrics.xdp_packets.raise_to(verdict, count);
            }
            let lost = xdp.get(XdpVerdict::HeartbeatLost);
            metrics
                .ring_dropped
                .raise_to(Ring::Frames, xdp.get(XdpVerdict::MirrorLost));
            metrics.ring_dropped.raise_to(Ring::Heartbeats, lost);
            metrics
                .heartbeats_received
                .raise_to(HeartbeatReceived::Lost, lost);
        }
        if let Ok(gate) = counters.gate() {
            for verdict in GateVerdict::ALL {
                metrics.gate_packets.raise_to(verdict, gate.get(verdict));
            }
        }
        if let Ok(mirror) = counters.mirror() {
            for verdict in MirrorVerdict::ALL {
                let count = mirror.get(verdict);
                metrics.mirror_packets.raise_to(verdict, count);
            }
        }
        if let Ok(ack_gate) = counters.ack_gate() {
            for verdict in AckGateVerdict::ALL {
                let count = ack_gate.get(verdict);
                metrics.ack_gate_packets.raise_to(verdict, count);
            }
        }
        let node = story.shared.node();
        metrics.state.choose(node.state);
        metrics.epoch.set(node.epoch as i64);
        if let Some(age) = story.peer_age() {
            metrics.heartbeat_age.set(age.as_secs_f64());
        }
    })
}

/// `Err` says when somebody was heard last, if that is longer ago than `most`.
fn heard_within(age: Option<Duration>, most: Duration) -> Result<(), String> {
    match age {
        None => Err("never heard".to_owned()),
        Some(age) if age > most => Err(format!("last heard {age:.1?} ago")),
        Some(_) => Ok(()),
    }
}

/// What the agent can tell about itself.
struct Story {
    node: Ipv4Addr,
    peer: Ipv4Addr,
    role: Role,
    virtual_ip: Ipv4Addr,
    interface: String,
    xdp_mode: XdpMode,
    ready_silence: Duration,
    /// Of the sync channel, for an active node; `None` with `protect: async`.
    sync_silence: Option<Duration>,
    started: Instant,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    redundancy: Arc<Redundancy>,
    failovers: Mutex<Failovers>,
}

/// Takeovers by this node since it started.
#[derive(Clone, Default)]
struct Failovers {
    count: u64,
    /// The latest last.
    history: VecDeque<Failover>,
}

impl Story {
    fn new(
        config: &Config,
        role: Role,
        own: usize,
        xdp_mode: XdpMode,
        shared: &Arc<Shared>,
        metrics: &Arc<Metrics>,
        redundancy: &Arc<Redundancy>,
    ) -> Self {
        let ready_silence = READY_SILENCE.max(config.heartbeat.takeover_time());
        Self {
            node: config.nodes[own],
            peer: config.nodes[1 - own],
            role,
            virtual_ip: config.virtual_ip,
            interface: config.interface.clone(),
            xdp_mode,
            ready_silence,
            sync_silence: match &config.protect {
                Protect::Async => None,
                Protect::Sync(sync) => Some(ready_silence.max(sync.timeout)),
            },
            started: Instant::now(),
            shared: Arc::clone(shared),
            metrics: Arc::clone(metrics),
            redundancy: Arc::clone(redundancy),
            failovers: Mutex::default(),
        }
    }

    fn took_over(&self, takeover: &Takeover) {
        let duration = Duration::from_nanos(takeover.duration);
        tracing::info!(
            reason = takeover.reason.as_str(),
            epoch = takeover.epoch,
            ?duration,
            "announced the VIP"
        );
        if !TakeoverReason::FAILOVERS.contains(&takeover.reason) {
            return;
        }
        self.metrics
            .failovers
            .with_label_values(&[takeover.reason.as_str()])
            .inc();
        self.metrics
            .takeover_duration
            .observe(duration.as_secs_f64());
        let mut failovers = self
            .failovers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        failovers.count += 1;
        if failovers.history.len() == HISTORY {
            failovers.history.pop_front();
        }
        failovers.history.push_back(Failover {
            reason: takeover.reason.as_str().to_owned(),
            epoch: takeover.epoch,
            at: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            duration_seconds: duration.as_secs_f64(),
        });
    }

    fn peer_age(&self) -> Option<Duration> {
        self.shared.peer_heard_at().map(age)
    }

    fn sync_age(&self) -> Option<Duration> {
        self.shared.sync_heard_at().map(age)
    }

    /// Whether the death of either node would be survived, and cost no connection, as far as this one can
    /// tell: an active node that is to protect and for long has not been able to is not ready, though it
    /// serves, and neither is a standby that lacks a flow. Who restarts nodes one after the other must wait
    /// here. What is shorter is for `rfsis_protection` and `rfsis_flows` to show.
    fn ready(&self) -> Result<(), String> {
        let peer = self.peer;
        heard_within(self.peer_age(), self.ready_silence)
            .map_err(|heard| format!("peer {peer} was {heard}"))?;
        let node = self.shared.node();
        let peer_state = node.peer.map_or(State::Standby, |peer| peer.state);
        match (node.state, peer_state) {
            (State::Active, State::Standby) | (State::Standby, State::Active) => {}
            (own, other) => {
                let (own, other) = (own.as_str(), other.as_str());
                return Err(format!("this node is {own} and peer {peer} is {other}"));
            }
        }
        if let Some(most) = self.sync_silence
            && node.state == State::Active
        {
            heard_within(self.sync_age(), most).map_err(|heard| {
                format!("not protected: peer {peer} was {heard} on the sync channel (`sync_port`)")
            })?;
        }
        match self.shared.safe_at().map(age) {
            Some(age) if age <= self.ready_silence => Ok(()),
            _ => Err(format!("not protected: {} flows", self.at_risk())),
        }
    }

    /// Flows that a takeover by the standby would lose: neither node knows of all of them.
    fn at_risk(&self) -> u32 {
        let peer = self.shared.node().peer;
        peer.map_or(0, |peer| peer.at_risk)
            .max(self.shared.at_risk())
    }

    fn protection(&self) -> ProtectionStatus {
        let flows = |condition| self.metrics.guarded_flows.get(condition) as u64;
        ProtectionStatus {
            // Chosen before the first question can be asked.
            mode: self
                .metrics
                .protection
                .chosen()
                .unwrap_or(Protection::Standby),
            guarded: flows(GuardCondition::Guarded),
            exposed: flows(GuardCondition::Exposed),
            opening: flows(GuardCondition::Opening),
            sync_heard_seconds_ago: self.sync_age().map(|age| age.as_secs_f64()),
        }
    }

    fn status(&self) -> Status {
        let node = self.shared.node();
        let census = self.shared.census();
        let failovers = self
            .failovers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let count = |count: usize| count as u64;
        Status {
            node: self.node,
            role: self.role,
            state: node.state,
            epoch: node.epoch,
            virtual_ip: self.virtual_ip,
            interface: self.interface.clone(),
            xdp_mode: self.xdp_mode,
            peer: node.peer.zip(self.peer_age()).map(|(peer, age)| Peer {
                node: self.peer,
                state: peer.state,
                epoch: peer.epoch,
                heard_seconds_ago: age.as_secs_f64(),
            }),
            protection: self.protection(),
            flows: FlowCounts {
                handshake: count(census.handshake),
                lockstep: count(census.lockstep),
                lagging: count(census.lagging),
                diverged: count(census.diverged),
                unprotected: count(census.unprotected),
                live: count(census.live),
            },
            at_risk: self.at_risk().into(),
            redundant_since: self
                .redundancy
                .since()
                .map(|since| humantime::format_rfc3339_millis(since).to_string()),
            failovers: failovers.count,
            last_failover: failovers.history.back().cloned(),
            history: failovers.history.into(),
            ready: self.ready().is_ok(),
            not_ready: self.ready().err(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::heartbeat::Nanos;
    use crate::shared::{NodeView, PeerGlimpse};

    /// The story of an agent with the shipped config and these lines instead of its protection.
    fn story(protect: &str) -> Story {
        let shipped = include_str!("../../config.yaml");
        let text = shipped.replacen("protect: sync\n", &format!("{protect}\n"), 1);
        let config = crate::config::parse(&text, Path::new("config.yaml")).unwrap();
        let metrics = Arc::new(Metrics::new("test").unwrap());
        let shared = Arc::<Shared>::default();
        let redundancy = Arc::new(Redundancy::new(
            Arc::clone(&shared),
            Arc::clone(&metrics),
            PulseHandle::new().unwrap().0,
            VipSockets {
                vip: config.virtual_ip,
                ports: Vec::new(),
            },
            None,
        ));
        Story::new(
            &config,
            Role::Primary,
            0,
            XdpMode::Native,
            &shared,
            &metrics,
            &redundancy,
        )
    }

    /// The node is this, and its peer the other of active and standby; no flow is at risk.
    fn turn(story: &Story, state: State) {
        turn_to(story, state, 0);
    }

    fn turn_to(story: &Story, state: State, at_risk: u32) {
        let view = NodeView {
            state,
            epoch: 1,
            peer: Some(PeerGlimpse {
                state: match state {
                    State::Active => State::Standby,
                    _ => State::Active,
                },
                epoch: 1,
                role: Role::Backup,
                at_risk,
            }),
        };
        assert!(story.shared.try_set_node(view));
        if at_risk == 0 {
            story.shared.set_safe(ago(Duration::ZERO));
        }
    }

    fn ago(duration: Duration) -> Nanos {
        sys::monotonic() - duration.as_nanos() as Nanos
    }

    #[test]
    fn ready_is_who_heard_the_peer_within_a_second() {
        let story = story("protect: async");
        turn(&story, State::Active);
        assert!(story.ready().unwrap_err().contains("never heard"));
        story.shared.peer_heard(ago(Duration::from_secs(2)), [0; 6]);
        let why = story.ready().unwrap_err();
        assert!(why.contains("192.168.1.2 was last heard 2.0s ago"), "{why}");
        story.shared.peer_heard(ago(Duration::ZERO), [0; 6]);
        assert_eq!(story.ready(), Ok(()));
    }

    #[test]
    fn an_active_node_without_protection_for_long_is_not_ready_and_a_standby_is() {
        let story = story("protect: sync\nprotect_timeout: 4s");
        story.shared.peer_heard(ago(Duration::ZERO), [0; 6]);
        turn(&story, State::Standby);
        assert_eq!(story.ready(), Ok(()));
        turn(&story, State::Active);
        let why = story.ready().unwrap_err();
        assert!(
            why.contains("not protected") && why.contains("sync_port"),
            "{why}"
        );
        // Degraded or not: as long as this the clients may wait.
        story.shared.sync_heard(ago(Duration::from_secs(3)));
        assert_eq!(story.ready(), Ok(()));
        story.shared.sync_heard(ago(Duration::from_secs(5)));
        let why = story.ready().unwrap_err();
        assert!(
            why.contains("last heard 5.0s ago on the sync channel"),
            "{why}"
        );
    }

    #[test]
    fn with_flows_at_risk_for_long_neither_node_is_ready_and_status_says_how_many() {
        let story = story("protect: async");
        for (state, own, peer) in [(State::Standby, 0, 3), (State::Active, 3, 1)] {
            story.shared.peer_heard(ago(Duration::ZERO), [0; 6]);
            turn_to(&story, state, peer);
            story.shared.set_at_risk(own);
            story.shared.set_safe(ago(Duration::from_millis(500)));
            assert_eq!(story.ready(), Ok(()), "flows lag for moments");
            story.shared.set_safe(ago(Duration::from_secs(2)));
            assert_eq!(story.ready(), Err("not protected: 3 flows".into()));
            let status = story.status();
            assert_eq!((status.at_risk, status.ready), (3, false));
            assert_eq!(status.not_ready, story.ready().err());
        }
    }

    #[test]
    fn two_standbys_are_not_ready() {
        let story = story("protect: async");
        story.shared.peer_heard(ago(Duration::ZERO), [0; 6]);
        turn(&story, State::Fenced);
        let why = story.ready().unwrap_err();
        assert!(why.contains("fenced") && why.contains("active"), "{why}");
    }

    #[test]
    fn the_history_keeps_the_latest_and_counts_all() {
        let story = story("protect: async");
        for epoch in 1..=HISTORY as u64 + 2 {
            story.took_over(&Takeover {
                reason: TakeoverReason::Switchover,
                epoch,
                duration: 5,
            });
        }
        let status = story.status();
        assert_eq!(status.failovers, HISTORY as u64 + 2);
        let epochs: Vec<u64> = status.history.iter().map(|f| f.epoch).collect();
        assert_eq!(epochs, (3..=HISTORY as u64 + 2).collect::<Vec<_>>());
        assert_eq!(status.last_failover.as_ref(), status.history.last());
        assert_eq!(status.history[0].reason, "switchover");
    }

    #[test]
    fn redundancy_is_dated_while_it_lasts_and_its_lack_is_counted() {
        let story = story("protect: async");
        story.redundancy.note(false);
        assert_eq!(story.status().redundant_since, None);
        assert!(story.metrics.without_redundancy.get() > 0.0);
        story.redundancy.note(true);
        let (since, without) = (
            story.status().redundant_since,
            story.metrics.without_redundancy.get(),
        );
        assert!(since.is_some());
        story.redundancy.note(true);
        assert_eq!(story.status().redundant_since, since);
        assert_eq!(story.metrics.without_redundancy.get(), without);
        story.redundancy.note(false);
        assert_eq!(story.status().redundant_since, None);
    }

    #[test]
    fn status_tells_what_the_gate_guards() {
        let story = story("protect: sync");
        let metrics = &story.metrics;
        metrics.protection.choose(Protection::Standby);
        metrics.protection.choose(Protection::Sync);
        metrics.guarded_flows.set(GuardCondition::Guarded, 3.0);
        metrics.guarded_flows.set(GuardCondition::Exposed, 2.0);
        metrics.guarded_flows.set(GuardCondition::Opening, 1.0);
        let expected = ProtectionStatus {
            mode: Protection::Sync,
            guarded: 3,
            exposed: 2,
            opening: 1,
            sync_heard_seconds_ago: None,
        };
        assert_eq!(story.status().protection, expected);
        story.shared.sync_heard(ago(Duration::from_secs(1)));
        let heard = story.status().protection.sync_heard_seconds_ago.unwrap();
        assert!((1.0..2.0).contains(&heard), "{heard}");
    }
}
