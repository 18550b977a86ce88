//! Clocks that step, and clocks that differ.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use tests::agent::{binary, port};
use tests::client::connect;
use tests::netns::mortal;
use tests::patience::wait_until;
use tests::pulse::Pulse;
use tests::{Agent, Capture, Death, Host, Lab, Pair, Typist, Wiring};

/// Heartbeats of both nodes: many deadlines.
const A_WHILE: f64 = 40.0;

/// libfaketime: what the preloaded program asks of CLOCK_REALTIME goes by a file.
fn library() -> PathBuf {
    let libraries = fs::read_dir("/usr/lib").unwrap();
    let path = |dir: fs::DirEntry| dir.path().join("faketime/libfaketimeMT.so.1");
    let found = libraries.flatten().map(path).find(|path| path.exists());
    found.expect("libfaketime is missing: cargo xtask setup")
}

/// A node whose wall clock is off by what the file says: `+2h`.
fn with_own_clock(lab: &Lab, host: Host, role: &str) -> (Agent, PathBuf) {
    let clock = lab.directory().join(format!("{role}.clock"));
    fs::write(&clock, "+0").unwrap();
    let config = lab.directory().join(format!("{role}.yaml"));
    fs::write(&config, Wiring::Mirror.settings().yaml()).unwrap();
    let mut command = mortal(binary());
    command
        .env("LD_PRELOAD", library())
        .env("FAKETIME_TIMESTAMP_FILE", &clock)
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let agent = Agent::start_by(command, lab, host, role, &config).unwrap();
    (agent, clock)
}

/// The hour that the active's wall clock shows (RFC 867).
fn hour(lab: &Lab) -> String {
    let mut text = String::new();
    let mut stream = connect(lab, port::DAYTIME).unwrap();
    stream.read_to_string(&mut text).unwrap();
    let (head, _) = text.split_once(':').unwrap();
    head[head.len() - 2..].to_owned()
}

/// Steps the wall clock of the active by two hours, so that the hour differs even if one ends meanwhile.
fn step(lab: &Lab, clock: &Path, to: &str) {
    let before = hour(lab);
    fs::write(clock, to).unwrap();
    wait_until("the clock to step", || hour(lab), |now| *now != before);
}

fn let_deadlines_pass(pair: &Pair) {
    for agent in [&pair.primary, &pair.backup] {
        let sent = [("direction", "sent"), ("result", "ok")];
        let now = agent.metrics().sum("rfsis_heartbeats_total", &sent);
        agent.wait_metric("rfsis_heartbeats_total", &sent, now + A_WHILE);
    }
}

#[test]
fn wall_clocks_that_step_by_hours_in_both_directions_move_nothing_and_a_failover_goes_on() {
    let lab = Wiring::Mirror.lab();
    let (primary, of_primary) = with_own_clock(&lab, Host::A, "primary");
    primary.wait_running();
    let (backup, of_backup) = with_own_clock(&lab, Host::B, "backup");
    let pair = Pair::settled(primary, backup);
    pair.primary.wait_protection("sync");
    let capture = Capture::start(&lab);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    let pulse = Pulse::start(&lab).unwrap();
    for to in ["+2h", "-2h", "+0"] {
        step(&lab, &of_primary, to);
        // Nobody asks it for the time yet.
        fs::write(&of_backup, to).unwrap();
        let_deadlines_pass(&pair);
        pulse.beat_on(20);
        nc.echoes("on");
        for (agent, state) in [(&pair.primary, "active"), (&pair.backup, "standby")] {
            let status = agent.status().unwrap();
            assert_eq!(
                (&status["state"], &status["epoch"]),
                (&state.into(), &1.into())
            );
        }
    }
    pair.backup.wait_flows("lockstep", 2);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    step(&lab, &of_backup, "-2h");
    nc.echoes("after");
    pulse.beat_on(20);
    println!("{:?}", pulse.finish().unwrap());
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    assert_eq!(trace.voices(), [Host::A.mac(), Host::B.mac()]);
}

/// Its leases would be read by another clock: that of a dead node would last for hours.
#[test]
fn an_agent_whose_monotonic_clock_is_not_the_machines_does_not_start() {
    let lab = Wiring::Mirror.lab();
    let config = lab.directory().join("config.yaml");
    fs::write(&config, Wiring::Mirror.settings().yaml()).unwrap();
    let mut command = mortal("unshare");
    command
        .args([
            "--time",
            "--fork",
            "--kill-child",
            "--monotonic",
            "7200",
            "--",
        ])
        .arg(binary());
    let mut agent = Agent::start_by(command, &lab, Host::A, "primary", &config).unwrap();
    assert_eq!(agent.await_exit().code(), Some(3));
    assert!(
        agent.log().contains("CLOCK_MONOTONIC is 7200 s off"),
        "{}",
        agent.log()
    );
}
