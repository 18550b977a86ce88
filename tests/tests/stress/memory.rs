//! A node that gets no more memory.

use tests::agent::port;
use tests::client::connect;
use tests::pulse::Pulse;
use tests::{Agent, Capture, Host, Lab, Pair, Typist, Wiring};

/// Connections until it needs more than it gets, at the most.
const CONNECTIONS: usize = 5_000;

/// From now on it gets no more memory than it has (RLIMIT_DATA of setrlimit(2)).
fn squeeze(lab: &Lab, agent: &Agent) {
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let kib: u64 = size
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    let limit = format!("prlimit --pid {} --data={}", agent.pid(), kib << 10);
    lab.host(agent.host()).sh(&limit).unwrap();
}

/// Opens connections until it has died of them.
fn crowd_out(lab: &Lab, agent: &mut Agent) {
    let mut crowd = Vec::new();
    while agent.is_running() {
        assert!(crowd.len() < CONNECTIONS, "it got its memory all the same");
        // One that the dying node had just accepted may be lost with it.
        crowd.extend(connect(lab, port::ECHO));
    }
    println!("{} connections were too many", crowd.len());
}

#[test]
fn an_active_that_gets_no_memory_dies_of_it_and_its_connections_go_on() {
    let lab = Wiring::Mirror.lab();
    let mut pair = Pair::start_guarding(&lab, &Wiring::Mirror.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    let pulse = Pulse::start(&lab).unwrap();
    pair.backup.wait_flows("lockstep", 2);
    let capture = Capture::start(&lab);
    squeeze(&lab, &pair.primary);
    crowd_out(&lab, &mut pair.primary);
    pair.wait_takeover();
    nc.echoes("after");
    pulse.beat_on(20);
    println!("{:?}", pulse.finish().unwrap());
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    assert_eq!(trace.voices(), [Host::A.mac(), Host::B.mac()]);
}

#[test]
fn a_standby_that_gets_no_memory_dies_of_it_and_disturbs_nobody() {
    let lab = Wiring::Mirror.lab();
    let mut pair = Pair::start_guarding(&lab, &Wiring::Mirror.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    let pulse = Pulse::start(&lab).unwrap();
    pair.backup.wait_flows("lockstep", 2);
    squeeze(&lab, &pair.backup);
    crowd_out(&lab, &mut pair.backup);
    pair.primary.wait_protection("degraded");
    nc.echoes("alone");
    pulse.beat_on(20);
    println!("{:?}", pulse.finish().unwrap());
    let status = pair.primary.status().unwrap();
    assert_eq!(
        (&status["state"], &status["epoch"]),
        (&"active".into(), &1.into())
    );
}
