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

mod story;
mod threads;

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rfsis_common::maps::{FlowKey, State};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::story::Story;
use self::threads::{Parts, bind_sync, join, make_link, start_engine, start_pulse};
use crate::bpf::{self, Approvals, BpfError, Counters, GuardParams, LoadParams, Programs};
use crate::cli::{Fatal, Role};
use crate::config::{Config, Protect, Protocol};
use crate::control::{self, Request, Response};
use crate::engine::{Command, FlowsTookOver};
use crate::handler::Output;
use crate::metrics::{self, HeartbeatReceived, Metrics, Protection, Ring};
use crate::netif::{Netif, NetifError, VipAddress};
use crate::node::{Fact, TakeoverReason};
use crate::privileges;
use crate::pulse::{Notice, PulseHandle};
use crate::redundancy::{self, Redundancy};
use crate::services::{Connections, FlowGate, Services};
use crate::shared::Shared;
use crate::sockets::{VipSockets, destroy_stale};
use crate::switchover::Switchover;
use crate::sys::{self};
use crate::tap;
use crate::warm::{keep_warm, warmer};
use rfsis_common::ack_gate::AckGateVerdict;
use rfsis_common::mirror::MirrorVerdict;
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

/// After a handover an agent that ends waits so long, for what still comes to it: frames of clients that
/// have just been told of the new owner.
const LINGER: Duration = Duration::from_millis(100);

/// What the heartbeat thread reports is kept so far for those who wait for it.
const FACTS: usize = 256;

/// Open files that are no connection of a service's at the most: maps, programs, sockets.
const OWN_FILES: u64 = 256;

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
    check_clock()?;
    sys::map_large_buffers();
    runtime()?.block_on(run_until_stopped(config, role))
}

/// Leases are written by this process and read by the programs in the kernel: by another clock a dead node's gate
/// would stay open for hours, or never open.
fn check_clock() -> Result<(), Fatal> {
    match sys::monotonic_offset() {
        0 => Ok(()),
        offset => Err(Fatal::Unable(anyhow::anyhow!(
            "CLOCK_MONOTONIC is {offset} s off that of the machine, by which the eBPF programs go: run the agent in the machine's time namespace"
        ))),
    }
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
                slots: crate::guard::slots(config.shadow.max_flows) as u32,
                ifindex: netif.index,
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
    // Those of the services, and the agent's own.
    let files = config.shadow.max_flows as u64 + OWN_FILES;
    if let Err(error) = sys::reserve_open_files(files) {
        tracing::warn!(%error, "cannot enlarge the table of open files: connections may wait while it grows");
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
