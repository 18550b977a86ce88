//! Network namespaces without names: held by a descriptor, gone with the process.
//!
//! Nothing is registered below `/run/netns`, so nothing is left behind even by `kill -9` of the
//! test: the kernel frees a namespace when its last descriptor and process are gone, and children
//! die with the thread that started them (`PR_SET_PDEATHSIG`).

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, Output};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a mount namespace of its own: `/run` is empty, `/sys` shows this
/// namespace's devices, as on a host of its own.
#[derive(Debug)]
pub struct Namespace {
    network: File,
    jobs: Option<Sender<Job>>,
    keeper: Option<JoinHandle<()>>,
}

impl Namespace {
    /// A new, empty namespace with IPv6 off.
    ///
    /// # Errors
    /// When the process lacks CAP_SYS_ADMIN.
    pub fn new() -> Result<Self> {
        let (jobs, inbox) = channel();
        let (ready, opened) = channel();
        let keeper = std::thread::Builder::new()
            .name("namespace".into())
            .spawn(move || keep(&ready, &inbox))?;
        let network = opened.recv().context("the namespace thread died")??;
        Ok(Self {
            network,
            jobs: Some(jobs),
            keeper: Some(keeper),
        })
    }

    /// A path that opens the network namespace, as `ip link … netns PATH` takes it.
    pub fn path(&self) -> PathBuf {
        let process = std::process::id();
        PathBuf::from(format!("/proc/{process}/fd/{}", self.network.as_raw_fd()))
    }

    /// Runs `body` on a thread inside the network namespace and waits for it. Sockets opened there
    /// stay in the namespace wherever they are used later.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let joined = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    if let Err(error) = setns(&self.network, CloneFlags::CLONE_NEWNET) {
                        panic!("setns: {error}: run as root");
                    }
                    body()
                })
                .join()
        });
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Starts a program inside. It is killed when the namespace goes or this process dies.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(&self, mut command: Command) -> Result<Child> {
        let (answer, started) = channel();
        let program = command.get_program().to_string_lossy().into_owned();
        let job: Job = Box::new(move || {
            // The receiver waits below; were it gone, the child would have no owner and must not live.
            if let Err(orphan) = answer.send(command.spawn())
                && let Ok(mut child) = orphan.0
            {
                child.kill().ok();
                child.wait().ok();
            }
        });
        self.jobs
            .as_ref()
            .context("the namespace is closed")?
            .send(job)
            .ok()
            .context("the namespace thread died")?;
        started
            .recv()
            .context("the namespace thread died")?
            .with_context(|| format!("cannot start {program}"))
    }

    /// Runs a program inside to its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let mut command = mortal(program);
        command
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        self.spawn(command)?
            .wait_with_output()
            .with_context(|| format!("cannot wait for {program}"))
    }

    /// Runs a command line (split at blanks) inside and returns what it printed.
    ///
    /// # Errors
    /// When it cannot be started or fails; the error holds what it printed.
    pub fn sh(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("empty command line")?;
        let output = self.output(program, &words.collect::<Vec<_>>())?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("`{line}`: {}: {}", output.status, stderr.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets `net.ipv4.…` and the like inside, `key` with slashes below `/proc/sys/net`.
    ///
    /// # Errors
    /// When the kernel does not know the key or the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| std::fs::write(format!("/proc/sys/net/{key}"), value))
            .with_context(|| format!("net/{key} = {value}"))
    }

    /// Segments that its TCP has sent again (RetransSegs of RFC 4022).
    ///
    /// # Errors
    /// When the kernel does not count them.
    pub fn repeated(&self) -> Result<u64> {
        let table = self.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))?;
        let mut lines = table.lines().filter_map(|line| line.strip_prefix("Tcp: "));
        let (names, values) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
        let mut fields = names.split(' ').zip(values.split(' '));
        let (_, value) = fields
            .find(|(name, _)| *name == "RetransSegs")
            .context("no RetransSegs in /proc/net/snmp")?;
        Ok(value.parse()?)
    }
}

impl Drop for Namespace {
    /// With all its TCP connections: what dead programs leave open keeps a namespace, and its kernel repeats each FIN
    /// to nobody for minutes. Of 10,000 that were closed together the timers expire together, and whatever runs next
    /// finds a CPU stopped by them for 10 to 40 ms.
    fn drop(&mut self) {
        if let Err(error) = self.sh("ss --no-header --tcp --all --kill") {
            eprintln!("connections stay in a namespace: {error:#}");
        }
        drop(self.jobs.take());
        if let Some(keeper) = self.keeper.take() {
            keeper.join().ok();
        }
    }
}

/// A command whose process is killed by the kernel when the thread that started it ends.
pub fn mortal(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program.as_ref());
    command
}

/// The thread that is the namespace's first inhabitant and the parent of its programs.
fn keep(ready: &Sender<Result<File>>, inbox: &Receiver<Job>) {
    let entered = enter();
    let failed = entered.is_err();
    if ready.send(entered).is_err() || failed {
        return;
    }
    for job in inbox {
        job();
    }
}

fn enter() -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("cannot make a namespace: run as root")?;
    const NONE: Option<&str> = None;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).context("private /")?;
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), NONE).context("/run")?;
    mount(Some("sys"), "/sys", Some("sysfs"), MsFlags::empty(), NONE).context("/sys")?;
    // A kernel without bpffs runs RFSIS all the same: nothing is pinned.
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        NONE,
    )
    .ok();
    for scope in ["all", "default"] {
        let key = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        // Missing where the kernel has no IPv6 at all.
        std::fs::write(key, "1").ok();
    }
    File::open("/proc/thread-self/ns/net").context("/proc/thread-self/ns/net")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_namespace_sees_only_its_own_devices_and_run_directory() {
        let namespace = Namespace::new().unwrap();
        let links = namespace.sh("ip -o link").unwrap();
        assert_eq!(links.lines().count(), 1, "only lo: {links}");
        assert_eq!(namespace.sh("ls /run").unwrap(), "");
        assert_eq!(namespace.sh("ls /sys/class/net").unwrap().trim(), "lo");
    }

    #[test]
    fn a_program_dies_with_its_namespace() {
        let namespace = Namespace::new().unwrap();
        let mut command = mortal("sleep");
        command.arg("1000");
        let mut child = namespace.spawn(command).unwrap();
        let name = format!("/proc/{}/comm", child.id());
        crate::patience::wait_until(
            "setpriv to become sleep",
            || std::fs::read_to_string(&name).unwrap(),
            |name| name.trim() == "sleep",
        );
        drop(namespace);
        let status = child.wait().unwrap();
        assert!(!status.success(), "killed, not finished: {status}");
    }

    #[test]
    fn a_connection_that_nobody_owns_goes_with_its_namespace() {
        let namespace = Namespace::new().unwrap();
        namespace.sh("ip link set lo up").unwrap();
        let ends = namespace.run(|| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (client, listener.accept().unwrap().0)
        });
        namespace.sh("ip link set lo down").unwrap();
        drop(ends);
        let network = File::open(namespace.path()).unwrap();
        let connections = || {
            std::thread::scope(|scope| {
                let table = scope.spawn(|| {
                    setns(&network, CloneFlags::CLONE_NEWNET).unwrap();
                    std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap()
                });
                table.join().unwrap().lines().skip(1).count()
            })
        };
        assert_eq!(connections(), 2);
        drop(namespace);
        assert_eq!(connections(), 0);
    }
}
