//! The same LAN with the same service, with RFSIS and without, measured in turns.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use tests::metrics::Metrics;
use tests::{Agent, Bridge, Host, Lab, LabOptions, Pair, Settings, Wiring};

use crate::plain::Plain;
use crate::process::threads;
use crate::settled::{VOID_MOST, is_standby, pair};

/// How the names of the agent's threads begin that do not serve clients.
const OWN_THREADS: &str = "rfsis-";

/// Room for the connections of some seconds: what has ended lingers for two, and is reaped each second.
const MAX_FLOWS: u32 = 100_000;

/// How the service is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arm {
    /// Not at all: there is no agent.
    Bare,
    /// `tap: mirror`, `protect: async`.
    Async,
    /// `tap: mirror`, `protect: sync`.
    Sync,
    /// The same, with the copies on a cable of their own.
    SyncLink,
}

impl Arm {
    /// As the tables call it.
    pub const fn name(self) -> &'static str {
        match self {
            Arm::Bare => "bare",
            Arm::Async => "mirror, async",
            Arm::Sync => "mirror, sync",
            Arm::SyncLink => "sync link, sync",
        }
    }

    fn settings(self) -> Settings {
        let settings = match self {
            Arm::Bare => Settings::default(),
            Arm::Async => Wiring::MirrorAsync.settings(),
            Arm::Sync => Wiring::MirrorOffloaded.settings(),
            Arm::SyncLink => Wiring::MirrorOverSyncLink.settings(),
        };
        Settings {
            native_xdp: false,
            max_flows: Some(MAX_FLOWS),
            ..settings
        }
    }

    fn is_sync(self) -> bool {
        matches!(self, Arm::Sync | Arm::SyncLink)
    }
}

/// Who answers.
enum Server {
    Plain(Plain),
    Agents(Pair),
}

/// A LAN with a client and a server, offloads on. The endpoints have a CPU each: the client the first, the
/// service the last. What else the agents do runs where there is room.
pub struct Site {
    /// The LAN.
    pub lab: Lab,
    arm: Arm,
    server: Server,
}

impl Site {
    fn build(arm: Arm) -> Result<Self> {
        let lab = Lab::build(&LabOptions {
            bridge: Bridge::Learning,
            offloads: true,
            sync_link: arm == Arm::SyncLink,
            // Room for connections in quick succession: each keeps its port for a while.
            client_sysctls: vec![
                ("ipv4/ip_local_port_range", "1024 65000"),
                ("ipv4/tcp_tw_reuse", "1"),
            ],
            ..LabOptions::default()
        })?;
        let server = match arm {
            Arm::Bare => Server::Plain(Plain::start(&lab, Host::A)?),
            _ => Server::Agents(pair(&lab, &arm.settings())),
        };
        let site = Self { lab, arm, server };
        if let (Some(active), true) = (site.active(), arm.is_sync()) {
            active.wait_metric("rfsis_protection", &[("mode", "sync")], 1.0);
        }
        pin_service(site.server_pid(), last_cpu()?)?;
        Ok(site)
    }

    /// What paces the connections that begin from now on, at both ends.
    ///
    /// # Errors
    /// When the kernel does not know it.
    pub fn set_congestion_control(&self, name: &str) -> Result<()> {
        for host in Host::ALL {
            let host = self.lab.host(host);
            host.sysctl("ipv4/tcp_congestion_control", name)?;
        }
        Ok(())
    }

    /// The active node's agent.
    pub fn active(&self) -> Option<&Agent> {
        match &self.server {
            Server::Plain(_) => None,
            Server::Agents(pair) => Some(&pair.primary),
        }
    }

    /// The other's.
    pub fn standby(&self) -> Option<&Agent> {
        match &self.server {
            Server::Plain(_) => None,
            Server::Agents(pair) => Some(&pair.backup),
        }
    }

    /// The process that answers.
    pub fn server_pid(&self) -> u32 {
        match &self.server {
            Server::Plain(plain) => plain.pid(),
            Server::Agents(pair) => pair.primary.pid(),
        }
    }

    /// Where that is.
    pub fn server_host(&self) -> Host {
        self.active().map_or(Host::A, Agent::host)
    }

    /// Whether the nodes still do what they were to do.
    fn holds(&self) -> bool {
        let Server::Agents(pair) = &self.server else {
            return true;
        };
        let guards =
            |metrics: &Metrics| metrics.sum("rfsis_protection", &[("mode", "sync")]) == 1.0;
        is_standby(&pair.backup) && (!self.arm.is_sync() || guards(&pair.primary.metrics()))
    }
}

/// A site for each arm. Each is built once, so that what is compared is measured within seconds.
pub struct Turns {
    arms: Vec<Arm>,
    sites: BTreeMap<Arm, Site>,
    /// Measurements in which the nodes changed places, or the standby fell silent.
    pub void: usize,
}

impl Turns {
    /// Of these arms.
    pub fn new(arms: &[Arm]) -> Self {
        Self {
            arms: arms.to_vec(),
            sites: BTreeMap::new(),
            void: 0,
        }
    }

    /// Measures all arms so many times: first one way round, then the other, so that a drift of the machine
    /// meets all alike. Returns the outcomes of each arm, by round.
    pub fn measure<T>(
        &mut self,
        rounds: usize,
        measure: impl Fn(&Site) -> Result<T>,
    ) -> Result<BTreeMap<Arm, Vec<T>>> {
        let mut outcomes: BTreeMap<Arm, Vec<T>> = BTreeMap::new();
        for round in 0..rounds {
            let mut order = self.arms.clone();
            if round % 2 == 1 {
                order.reverse();
            }
            for arm in order {
                let outcome = self.valid(arm, &measure);
                let outcome = outcome.with_context(|| format!("measuring {}", arm.name()))?;
                outcomes.entry(arm).or_default().push(outcome);
            }
        }
        Ok(outcomes)
    }

    fn valid<T>(&mut self, arm: Arm, measure: impl Fn(&Site) -> Result<T>) -> Result<T> {
        loop {
            let site = match self.sites.remove(&arm) {
                Some(site) => site,
                None => Site::build(arm)?,
            };
            let outcome = measure(&site);
            if site.holds() {
                self.sites.insert(arm, site);
                return outcome;
            }
            self.void += 1;
            ensure!(
                self.void <= VOID_MOST,
                "in {} runs the nodes changed places or the standby fell silent",
                self.void
            );
        }
    }
}

/// The ratios of an arm to another, round by round.
pub fn ratios<T>(
    outcomes: &BTreeMap<Arm, Vec<T>>,
    arm: Arm,
    to: Arm,
    of: impl Fn(&T) -> f64,
) -> Vec<f64> {
    let (Some(these), Some(those)) = (outcomes.get(&arm), outcomes.get(&to)) else {
        return Vec::new();
    };
    let pairs = these.iter().zip(those);
    pairs.map(|(this, that)| of(this) / of(that)).collect()
}

/// Binds the calling thread to the client's CPU.
///
/// # Errors
/// Of sched_setaffinity(2).
pub fn pin_client() -> Result<()> {
    pin(Pid::from_raw(0), cpus()?[0])
}

/// Binds the threads that serve, and not those that watch over it.
///
/// # Errors
/// Of sched_setaffinity(2).
pub fn pin_service(process: u32, cpu: usize) -> Result<()> {
    let threads = threads(process)?.into_iter();
    for thread in threads.filter(|thread| !thread.name.starts_with(OWN_THREADS)) {
        pin(thread.id, cpu)?;
    }
    Ok(())
}

/// Binds all of a program's threads to a CPU: of a host that serves alone, none of them ever runs on the client's.
///
/// # Errors
/// Of sched_setaffinity(2).
pub fn pin_host(process: u32, cpu: usize) -> Result<()> {
    for thread in threads(process)? {
        pin(thread.id, cpu)?;
    }
    Ok(())
}

fn pin(thread: Pid, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(thread, &set).context("sched_setaffinity")
}

/// Those that this process may use; never none. Its main thread is never bound.
fn cpus() -> Result<Vec<usize>> {
    let main = Pid::from_raw(std::process::id().cast_signed());
    let set = sched_getaffinity(main).context("sched_getaffinity")?;
    let cpus: Vec<usize> = (0..CpuSet::count())
        .filter(|&cpu| set.is_set(cpu).unwrap_or(false))
        .collect();
    ensure!(!cpus.is_empty(), "this process may use no CPU");
    Ok(cpus)
}

/// The service's.
///
/// # Errors
/// Of sched_getaffinity(2).
pub fn last_cpu() -> Result<usize> {
    cpus()?.last().copied().context("no CPU")
}
