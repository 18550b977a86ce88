//! What the agent may do to its host, and what others may do to the agent.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use socket2::{Domain, Socket, Type};
use tests::agent::{METRICS_PORT, binary, port};
use tests::patience::wait_until;
use tests::{Agent, Death, Host, Lab, Pair, Settings, Tap, Typist};

/// `nobody`.
const USER: &str = "65534";

/// CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF: include/uapi/linux/capability.h.
const GRANTED: u64 = 1 << 10 | 1 << 12 | 1 << 13 | 1 << 39;
/// Bits of capabilities.
const IPC_LOCK: u64 = 1 << 14;

/// What `/proc/PID/task/TID/status` says of every thread.
fn threads(agent: &Agent) -> Vec<BTreeMap<String, String>> {
    std::fs::read_dir(format!("/proc/{}/task", agent.pid()))
        .unwrap()
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap())
        .map(|status| {
            let lines = status.lines().filter_map(|line| line.split_once(":\t"));
            lines
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect()
        })
        .collect()
}

#[track_caller]
fn assert_least_privileges(agent: &Agent, expected: u64) {
    let threads = threads(agent);
    let named = |name: &str| threads.iter().any(|thread| thread["Name"] == name);
    assert!(named("rfsis-heartbeat") && named("rfsis-shadows") && threads.len() >= 5);
    for thread in &threads {
        let set = |name: &str| u64::from_str_radix(&thread[name], 16).unwrap();
        assert_eq!(set("CapPrm"), expected, "{thread:#?}");
        assert_eq!(set("CapEff"), expected, "{thread:#?}");
        assert_eq!(set("CapInh") | set("CapAmb"), 0, "{thread:#?}");
        assert_eq!(thread["NoNewPrivs"], "1", "{thread:#?}");
    }
}

/// Whether the agent was given what it takes to lock its memory.
fn may_lock_memory() -> bool {
    let limit = std::fs::read_to_string("/proc/self/limits").unwrap();
    let unlimited = limit
        .lines()
        .any(|line| line.starts_with("Max locked memory") && line.contains("unlimited"));
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:\t"));
    unlimited || u64::from_str_radix(effective.unwrap(), 16).unwrap() & IPC_LOCK != 0
}

#[track_caller]
fn assert_memory_locked_or_said(agent: &Agent) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let locked = locked.unwrap().trim() != "0 kB";
    assert_eq!(locked, may_lock_memory(), "{status}");
    assert_ne!(locked, agent.log().contains("cannot lock memory"));
}

#[test]
fn every_thread_of_a_running_agent_has_five_capabilities() {
    let lab = Lab::new();
    let settings = Settings {
        tap: Tap::Mirror,
        sync: true,
        ..Settings::default()
    };
    let pair = Pair::start_guarding(&lab, &settings);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    for agent in [&pair.primary, &pair.backup] {
        assert_least_privileges(agent, GRANTED | IPC_LOCK);
        assert_memory_locked_or_said(agent);
        for thread in threads(agent) {
            let bounding = u64::from_str_radix(&thread["CapBnd"], 16).unwrap();
            assert_eq!(bounding, GRANTED | IPC_LOCK, "{thread:#?}");
        }
    }
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    nc.echoes("after");
    assert_least_privileges(&pair.backup, GRANTED | IPC_LOCK);
}

/// The capabilities that the unit file grants, as setpriv(1) takes them.
fn granted_by_the_unit() -> String {
    let unit = include_str!("../../dist/rfsis-agent.service");
    let line = |key: &str| {
        unit.lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap()
    };
    let granted = line("AmbientCapabilities=");
    assert_eq!(granted, line("CapabilityBoundingSet="));
    granted
        .split_whitespace()
        .map(|name| format!(",+{}", name.strip_prefix("CAP_").unwrap().to_lowercase()))
        .collect()
}

/// Readable and executable for everybody, wherever it was built.
fn public(lab: &Lab, name: &str, write: impl Fn(&Path)) -> PathBuf {
    let path = lab.directory().join(name);
    write(&path);
    for path in [lab.directory(), &path] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    path
}

fn public_binary(lab: &Lab) -> PathBuf {
    public(lab, "rfsis-agent", |path| {
        // Nobody writes to a program that runs.
        if !path.exists() {
            std::fs::copy(binary(), path).unwrap();
        }
    })
}

fn start_as_user(lab: &Lab, host: Host, role: &str) -> Agent {
    // One for each: the other agent may be reading its own just now.
    let config = public(lab, &format!("{role}-of-{host:?}.yaml"), |path| {
        std::fs::write(path, Settings::default().yaml()).unwrap();
    });
    let agent = public_binary(lab);
    let granted = granted_by_the_unit();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", USER, "--regid", USER, "--clear-groups"])
        .arg(format!("--bounding-set=-all{granted}"))
        .arg(format!("--inh-caps=-all{granted}"))
        .arg(format!("--ambient-caps=-all{granted}"))
        .args(["--pdeathsig", "KILL", "--"])
        .arg(agent);
    let directory = format!("install -d -o {USER} /run/rfsis");
    lab.host(host).sh(&directory).unwrap();
    Agent::start_by(command, lab, host, role, &config).unwrap()
}

#[test]
fn an_agent_of_an_unprivileged_user_does_all_that_one_of_root_does() {
    let lab = Lab::new();
    let primary = start_as_user(&lab, Host::A, "primary");
    let backup = start_as_user(&lab, Host::B, "backup");
    let pair = Pair::settled(primary, backup);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    for agent in [&pair.primary, &pair.backup] {
        assert_least_privileges(agent, GRANTED);
        for thread in threads(agent) {
            assert!(thread["Uid"].starts_with(USER), "{thread:#?}");
        }
    }
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    nc.echoes("after");
    assert_least_privileges(&pair.backup, GRANTED);
    assert!(nc.hang_up().success());
    // It comes back beside what the killed one left, is handed the VIP, and leaves nothing.
    let Pair { primary, backup } = pair;
    drop(primary);
    let again = start_as_user(&lab, Host::A, "backup");
    let mut pair = Pair::settled(backup, again);
    let asked = pair.primary.ask(&["switchover"]);
    assert!(asked.status.success(), "{asked:?}");
    pair.backup.wait_state("active");
    Typist::tcp(&lab, port::ECHO).echoes("to the one that came back");
    assert!(pair.backup.terminate().success());
    let node = lab.host(Host::A);
    let left = node.sh("ip -o addr show dev eth0").unwrap();
    assert!(!left.contains("192.168.1.100"), "{left}");
    let left = node.sh("tc qdisc show dev eth0 clsact").unwrap();
    assert!(!left.contains("clsact"), "{left}");
}

#[test]
fn the_control_socket_is_its_owners_alone() {
    let lab = Lab::new();
    let agent = Agent::start(&lab, Host::A, "primary", &Settings::default());
    agent.wait_state("active");
    let node = lab.host(Host::A);
    let mode = node.sh("stat -c %a:%u /run/rfsis/agent.sock").unwrap();
    assert_eq!(mode.trim(), "600:0");
    let config = public(&lab, "config.yaml", |path| {
        std::fs::write(path, Settings::default().yaml()).unwrap();
    });
    let client = public_binary(&lab);
    for command in ["status", "switchover"] {
        let (client, config) = (client.to_string_lossy(), config.to_string_lossy());
        let arguments = [
            "--reuid",
            USER,
            "--regid",
            USER,
            "--clear-groups",
            "--",
            &client,
            "--config",
            &config,
            command,
        ];
        let output = node.output("setpriv", &arguments).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("Permission denied"), "{said}");
    }
}

/// Resident memory, bytes.
fn resident(agent: &Agent) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", agent.pid())).unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn open_files(agent: &Agent) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", agent.pid()))
        .unwrap()
        .count()
}

#[test]
fn a_thousand_slow_scrapers_cost_little_and_delay_no_failover() {
    const CLIENTS: usize = 1000;
    let lab = Lab::new();
    let pair = Pair::start(&lab, &Settings::default());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    pair.backup.metrics();
    let before = (resident(&pair.backup), open_files(&pair.backup));
    // Slowloris: a head that never ends. Nobody waits to be let in: the backlog is shorter than the queue.
    let slow: Vec<Socket> = lab.client().run(|| {
        let to = SocketAddrV4::new(Host::B.address(), METRICS_PORT).into();
        let connecting = (0..CLIENTS).map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            // Under way.
            socket.connect(&to).unwrap_err();
            socket
        });
        connecting.collect()
    });
    // Those that are not let in yet, or were cut, take nothing.
    let drip = || {
        slow.iter()
            .filter(|socket| socket.send(b"G").is_ok())
            .count()
    };
    wait_until("all places to be taken", drip, |&open| open > 64);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    nc.echoes("after");
    assert!(drip() > 64, "they are still there");
    let after = (resident(&pair.backup), open_files(&pair.backup));
    println!("resident bytes, open files: {before:?}, then {after:?}");
    // 64 are served at a time, each with 8 KiB.
    assert!(after.0 < before.0 + (8 << 20), "{before:?} {after:?}");
    assert!(after.1 <= before.1 + 64 + 8, "{before:?} {after:?}");
    let status = pair.backup.status().unwrap();
    assert_eq!(status["failovers"], 1, "{status:#}");
    drop(slow);
    pair.backup.metrics();
}
