//! A running `rfsis-agent` on a node of the lab, and what it says about itself.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::lab::{Host, Lab, VIP};
use crate::metrics::Metrics;
use crate::netns::{Namespace, mortal};
use crate::patience::{slowed, slowness, wait_until};

/// Port of `/metrics` in every lab.
pub const METRICS_PORT: u16 = 9500;

/// Well-known ports of the built-in handlers.
pub mod port {
    /// RFC 862.
    pub const ECHO: u16 = 7;
    /// RFC 863.
    pub const DISCARD: u16 = 9;
    /// RFC 867.
    pub const DAYTIME: u16 = 13;
    /// RFC 864.
    pub const CHARGEN: u16 = 19;
}

/// How the agents get the VIP's frames to the standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tap {
    /// The LAN does.
    Lan,
    /// The active copies them.
    Mirror,
    /// The active copies them by this interface.
    MirrorOver(&'static str),
}

impl Tap {
    fn yaml(self) -> String {
        match self {
            Tap::Lan => "tap: lan\n".into(),
            Tap::Mirror => "tap: mirror\n".into(),
            Tap::MirrorOver(interface) => format!("tap: mirror\nsync_interface: {interface}\n"),
        }
    }
}

/// What the agents of a lab are told. The same for both nodes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the cluster.
    pub cluster: String,
    /// Cluster key, 32 bytes or more.
    pub key: String,
    /// How the standby gets the VIP's frames.
    pub tap: Tap,
    /// By XDP though the interfaces are veth, where the agent would have TC catch the frames.
    pub native_xdp: bool,
    /// Whether clients' ACKs wait for the standby: `sync`, else `async`.
    pub sync: bool,
    /// How long the standby may be silent before clients no longer wait for it, as the config writes it;
    /// the default if not given. Only with `sync`.
    pub protect_timeout: Option<String>,
    /// Bound of the shadows; the default if not given.
    pub max_flows: Option<u32>,
    /// Ring from the kernel to the shadows, as the config writes it; the default if not given.
    pub ring_bytes: Option<String>,
    /// How long a datagram waits for its answer, as the config writes it; the default if not given.
    pub udp_replay: Option<String>,
    /// How long a primary is a ready standby until it asks for the VIP, as the config writes it; never if
    /// not given.
    pub preempt: Option<String>,
    /// Heartbeat interval as the config writes it.
    pub interval: String,
    /// Intervals without heartbeat until takeover.
    pub missed: u32,
    /// How long a backup that hears nobody waits.
    pub startup_grace: String,
}

impl Default for Settings {
    /// 50 ms × 6: patient enough for a shared machine that stops for a tenth of a second.
    /// Slower where the machine is ([`slowness`]).
    fn default() -> Self {
        Self {
            cluster: "lab".into(),
            key: "a key for tests only, 32 bytes or more".into(),
            tap: Tap::Lan,
            native_xdp: true,
            sync: false,
            protect_timeout: None,
            max_flows: None,
            ring_bytes: None,
            udp_replay: None,
            preempt: None,
            interval: format!("{}ms", 50 * slowness()),
            missed: 6,
            startup_grace: format!("{}s", slowness()),
        }
    }
}

impl Settings {
    /// The defaults with another heartbeat.
    pub fn heartbeat(interval: &str, missed: u32) -> Self {
        Self {
            interval: interval.into(),
            missed,
            ..Self::default()
        }
    }

    /// The config file.
    pub fn yaml(&self) -> String {
        let Self {
            cluster,
            key,
            tap,
            native_xdp,
            sync,
            protect_timeout,
            max_flows,
            ring_bytes,
            udp_replay,
            preempt,
            interval,
            missed,
            startup_grace,
        } = self;
        let given = |key: &str, value: &Option<String>| {
            let line = value.as_ref().map(|value| format!("{key}: {value}\n"));
            line.unwrap_or_default()
        };
        let nodes = [Host::A, Host::B].map(|host| host.address().to_string());
        let bounds = [
            max_flows.map(|flows| format!("max_flows: {flows}")),
            ring_bytes
                .as_ref()
                .map(|bytes| format!("ring_bytes: {bytes}")),
        ];
        let bounds: Vec<String> = bounds.into_iter().flatten().collect();
        let shadow = match bounds.is_empty() {
            true => String::new(),
            false => format!("shadow: {{ {} }}\n", bounds.join(", ")),
        };
        let mut text = format!(
            "cluster: {cluster}\n\
             interface: eth0\n\
             virtual_ip: {VIP}/24\n\
             nodes: [{}]\n\
             key: {key:?}\n\
             {}\
             protect: {}\n\
             {}{}{}{}\
             heartbeat: {{ interval: {interval}, missed: {missed}, startup_grace: {startup_grace} }}\n\
             metrics: {{ listen: 0.0.0.0:{METRICS_PORT} }}\n\
             control: /run/rfsis/agent.sock\n\
             services:\n",
            nodes.join(", "),
            tap.yaml(),
            if *sync { "sync" } else { "async" },
            given("protect_timeout", protect_timeout),
            given("udp_replay", udp_replay),
            given("preempt", preempt),
            shadow,
        );
        for (handler, number) in [
            ("echo", port::ECHO),
            ("discard", port::DISCARD),
            ("daytime", port::DAYTIME),
            ("chargen", port::CHARGEN),
        ] {
            for protocol in ["tcp", "udp"] {
                text += &format!(
                    "  - {{ name: {handler}-{protocol}, listen: {protocol}/{number}, handler: {handler} }}\n"
                );
            }
        }
        text += if *native_xdp {
            "xdp: native\n"
        } else {
            "xdp: auto\n"
        };
        text
    }
}

/// The agent under test: `$RFSIS_AGENT`, else the release build of this workspace.
///
/// # Panics
/// When there is none; says how to get one.
pub fn binary() -> PathBuf {
    let path = std::env::var_os("RFSIS_AGENT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/rfsis-agent"),
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "no agent at {}: run `cargo xtask build`, or set RFSIS_AGENT",
        path.display()
    );
    path
}

/// A running agent. Killed when dropped; its log is printed when the test is failing.
#[derive(Debug)]
pub struct Agent {
    host: Host,
    namespace: Arc<Namespace>,
    child: Child,
    config: PathBuf,
    log: PathBuf,
}

impl Agent {
    /// Starts an agent with these settings.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(lab: &Lab, host: Host, role: &str, settings: &Settings) -> Self {
        let config = lab.directory().join(format!("{}.yaml", host.address()));
        let started = std::fs::write(&config, settings.yaml())
            .context("writing the config")
            .and_then(|()| Self::start_with(lab, host, role, &config));
        started.unwrap_or_else(|error| panic!("cannot start the agent on {host:?}: {error:#}"))
    }

    /// Starts an agent with a config file.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_with(lab: &Lab, host: Host, role: &str, config: &Path) -> Result<Self> {
        Self::start_by(mortal(binary()), lab, host, role, config)
    }

    /// Starts an agent by a command that runs the binary with the arguments that it is given.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_by(
        mut command: Command,
        lab: &Lab,
        host: Host,
        role: &str,
        config: &Path,
    ) -> Result<Self> {
        let namespace = Arc::clone(lab.host(host));
        let log = lab.directory().join(format!("{}.log", host.address()));
        let output = File::options().create(true).append(true).open(&log)?;
        command
            .arg("--config")
            .arg(config)
            .args(["--role", role])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let child = namespace.spawn(command)?;
        Ok(Self {
            host,
            namespace,
            child,
            config: config.to_owned(),
            log,
        })
    }

    /// The node that it runs on.
    pub fn host(&self) -> Host {
        self.host
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has logged, earlier agents on this host included.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `kill -9`. Returns when it was sent; the process may take milliseconds to be gone.
    ///
    /// # Panics
    /// When the process is already gone.
    pub fn kill9(&self) -> Instant {
        self.signal(Signal::SIGKILL)
    }

    /// `kill -STOP`. Returns when it was sent.
    ///
    /// # Panics
    /// When the process is already gone.
    pub fn stop(&self) -> Instant {
        self.signal(Signal::SIGSTOP)
    }

    /// `kill -CONT`.
    ///
    /// # Panics
    /// When the process is already gone.
    pub fn cont(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// `kill -TERM`, and how the process ended.
    ///
    /// # Panics
    /// When it does not end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.await_exit()
    }

    fn signal(&self, signal: Signal) -> Instant {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let sent = Instant::now();
        if let Err(error) = kill(pid, signal) {
            panic!("{signal} to the agent on {:?}: {error}", self.host);
        }
        sent
    }

    /// Waits until the process ends by itself.
    ///
    /// # Panics
    /// When it does not.
    pub fn await_exit(&mut self) -> ExitStatus {
        let what = format!("the agent on {:?} to end", self.host);
        let child = &mut self.child;
        let ended = wait_until(&what, || child.try_wait().ok().flatten(), Option::is_some);
        ended.unwrap_or_default()
    }

    /// Whether the process is still there.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Runs a sub-command of the agent on this node with its config.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn ask(&self, arguments: &[&str]) -> Output {
        run_agent(&self.namespace, &self.config, arguments)
    }

    /// `status --json`; `None` while it does not answer.
    pub fn status(&self) -> Option<Value> {
        let output = self.ask(&["status", "--json"]);
        output
            .status
            .success()
            .then(|| serde_json::from_slice(&output.stdout).ok())?
    }

    /// Waits for a status that `accept` likes.
    ///
    /// # Panics
    /// When none comes; prints the last.
    #[track_caller]
    pub fn wait_status(&self, what: &str, accept: impl Fn(&Value) -> bool) -> Value {
        let what = format!("{what} on {:?}", self.host);
        let accepted = |status: &Option<Value>| status.as_ref().is_some_and(&accept);
        wait_until(&what, || self.status(), accepted).unwrap_or_default()
    }

    /// Waits until it answers, and so sends heartbeats: one that starts now hears it within its start-up grace.
    ///
    /// # Panics
    /// When it never does.
    #[track_caller]
    pub fn wait_running(&self) {
        self.wait_status("an answer", |_| true);
    }

    /// Waits for a state by its word: `active`, `standby`, …
    ///
    /// # Panics
    /// When it does not come.
    #[track_caller]
    pub fn wait_state(&self, state: &str) -> Value {
        self.wait_status(&format!("state {state}"), |status| status["state"] == state)
    }

    /// Waits until it is active, and tells of the failover: the state is told at once, the story a moment later.
    ///
    /// # Panics
    /// When that never comes.
    #[track_caller]
    pub fn wait_failover(&self) -> Value {
        self.wait_status("active after a failover", |status| {
            status["state"] == "active" && !status["last_failover"].is_null()
        })
    }

    /// Waits until so many of its flows are in this condition: `lockstep`, `live`, …
    ///
    /// # Panics
    /// When they never are.
    #[track_caller]
    pub fn wait_flows(&self, condition: &str, count: u64) -> Value {
        self.wait_status(&format!("{count} flows {condition}"), |status| {
            status["flows"][condition] == count
        })
    }

    /// One scrape of `/metrics`.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        match self.http("/metrics") {
            Ok((200, body)) => Metrics::parse(&body),
            other => panic!("scraping {:?}: {other:?}", self.host),
        }
    }

    /// Waits until the sum of these series is at least `least`.
    ///
    /// # Panics
    /// When it never is; prints the last scrape.
    #[track_caller]
    pub fn wait_metric(&self, name: &str, labels: &[(&str, &str)], least: f64) -> Metrics {
        let what = format!("{name}{labels:?} ≥ {least} on {:?}", self.host);
        wait_until(
            &what,
            || self.metrics(),
            |scrape| scrape.sum(name, labels) >= least,
        )
    }

    /// Waits until the ACK gate guards, if there is one.
    ///
    /// # Panics
    /// When it does not come to that.
    pub fn wait_not_degraded(&self) {
        wait_until(
            "a standby that confirms",
            || self.metrics(),
            |scrape| scrape.sum("rfsis_protection", &[("mode", "degraded")]) == 0.0,
        );
    }

    /// Waits until it says that this is what it can promise: `sync`, `degraded`, …
    ///
    /// # Panics
    /// When it never does.
    #[track_caller]
    pub fn wait_protection(&self, mode: &str) -> Metrics {
        self.wait_metric("rfsis_protection", &[("mode", mode)], 1.0)
    }

    /// GET of a path on the metrics port: status code and body.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn http(&self, path: &str) -> Result<(u16, String)> {
        let address = (Ipv4Addr::LOCALHOST, METRICS_PORT);
        let mut stream = self.namespace.run(|| TcpStream::connect(address))?;
        stream.set_read_timeout(Some(slowed(Duration::from_secs(5))))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let code = head.split(' ').nth(1).context("no status line")?.parse()?;
        Ok((code, body.to_owned()))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            eprintln!("--- log of {:?}\n{}", self.host, self.log());
        }
    }
}

/// Runs the agent's binary in a namespace to its end.
///
/// # Panics
/// When it cannot be started.
pub fn run_agent(namespace: &Namespace, config: &Path, arguments: &[&str]) -> Output {
    let (binary, config) = (binary(), config.to_string_lossy());
    let mut line = vec!["--config", &*config];
    line.extend(arguments);
    namespace
        .output(&binary.to_string_lossy(), &line)
        .unwrap_or_else(|error| panic!("{error:#}"))
}

/// A way for a host to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// `kill -9` of the agent: the kernel goes on without it.
    Kill9,
    /// `kill -STOP`: hung, with everything still open.
    Stop,
    /// The cable is pulled: the host lives and knows nothing of it.
    LinkCut,
}

/// Primary on node a, active; backup on node b, standby; both ready.
#[derive(Debug)]
pub struct Pair {
    /// On node a.
    pub primary: Agent,
    /// On node b.
    pub backup: Agent,
}

impl Pair {
    /// Starts both and waits until they are what their roles say.
    ///
    /// # Panics
    /// When they do not get there.
    pub fn start(lab: &Lab, settings: &Settings) -> Self {
        let primary = Agent::start(lab, Host::A, "primary", settings);
        primary.wait_running();
        let backup = Agent::start(lab, Host::B, "backup", settings);
        Self::settled(primary, backup)
    }

    /// [`Pair::start`] with a config file, the same for both.
    ///
    /// # Errors
    /// When one cannot be started.
    ///
    /// # Panics
    /// When they do not become what their roles say.
    pub fn start_with(lab: &Lab, config: &Path) -> Result<Self> {
        let primary = Agent::start_with(lab, Host::A, "primary", config)?;
        primary.wait_running();
        let backup = Agent::start_with(lab, Host::B, "backup", config)?;
        Ok(Self::settled(primary, backup))
    }

    /// [`Pair::start`] with `protect: sync`; waits until clients are told only what the backup holds.
    ///
    /// # Panics
    /// When they do not get there.
    pub fn start_guarding(lab: &Lab, settings: &Settings) -> Self {
        let pair = Self::start(lab, settings);
        pair.primary.wait_protection("sync");
        pair
    }

    /// Waits until both are what their roles say.
    ///
    /// # Panics
    /// When they do not get there.
    pub fn settled(primary: Agent, backup: Agent) -> Self {
        for (agent, state, peer) in [
            (&primary, "active", "standby"),
            (&backup, "standby", "active"),
        ] {
            agent.wait_status(&format!("{state}, beside a {peer} peer"), |status| {
                status["state"] == state
                    && status["ready"] == true
                    && status["peer"]["state"] == peer
            });
        }
        primary.wait_not_degraded();
        Self { primary, backup }
    }

    /// Lets the primary's host die. Returns when it did.
    ///
    /// # Panics
    /// When it is dead already.
    pub fn primary_dies(&self, lab: &Lab, death: Death) -> Instant {
        match death {
            Death::Kill9 => self.primary.kill9(),
            Death::Stop => self.primary.stop(),
            Death::LinkCut => {
                let pulled = Instant::now();
                lab.cut(self.primary.host());
                pulled
            }
        }
    }

    /// Waits until the backup is active.
    ///
    /// # Panics
    /// When it never is.
    #[track_caller]
    pub fn wait_takeover(&self) -> Value {
        self.backup.wait_state("active")
    }

    /// The active node and the other, once there is exactly one active.
    ///
    /// # Panics
    /// When that never comes.
    pub fn by_state(self) -> (Agent, Agent) {
        if self.wait_one_active().host() == self.primary.host() {
            (self.primary, self.backup)
        } else {
            (self.backup, self.primary)
        }
    }

    /// Waits until exactly one node is active and the other standby; returns the active.
    ///
    /// # Panics
    /// When that never comes.
    #[track_caller]
    pub fn wait_one_active(&self) -> &Agent {
        let states = || {
            [&self.primary, &self.backup]
                .map(|agent| agent.status().map(|status| status["state"].clone()))
        };
        let settled = wait_until("exactly one active node", states, |states| {
            let count = |word| {
                states
                    .iter()
                    .flatten()
                    .filter(|&state| state == word)
                    .count()
            };
            count("active") == 1 && count("standby") == 1
        });
        let [first, _] = settled;
        if first.is_some_and(|state| state == "active") {
            &self.primary
        } else {
            &self.backup
        }
    }
}
