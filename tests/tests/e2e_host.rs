//! What the agent leaves on the host: nothing after a stop, silence after a death.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::net::TcpListener;

use tests::agent::port;
use tests::capture::Arp;
use tests::forge::{is_heartbeat_of, malformed};
use tests::netns::Namespace;
use tests::patience::{PATIENCE, wait_until};
use tests::wire::Wire;
use tests::{
    Agent, Capture, Death, Host, Lab, Pair, Settings, Typist, VIP, Wiring, on_each_wiring,
};

/// Everything about the host's network that the agent might touch.
fn configuration(host: &Namespace) -> String {
    [
        "ip -o addr show",
        "ip -o -d link show",
        "ip -o rule show",
        "ip -o route show table all",
        "tc qdisc show",
        "tc filter show dev eth0 egress",
        "tc filter show dev eth0 ingress",
        "tc filter show dev eth1 egress",
        "tc filter show dev eth1 ingress",
        "grep -r . /proc/sys/net/ipv4/conf /proc/sys/net/ipv4/neigh",
    ]
    .map(|line| {
        // `tc filter` fails where there is no clsact qdisc: that too is to be as before.
        let shown = host.sh(line).unwrap_or_else(|error| error.to_string());
        format!("$ {line}\n{shown}")
    })
    .join("")
}

on_each_wiring! { [lan: Lan, mirror_over_a_sync_link: MirrorOverSyncLink] {
    sigterm_leaves_the_host_as_it_was_found => sigterm_leaves_nothing;
    cleanup_after_kill_9_leaves_the_host_as_it_was_found => cleanup_leaves_nothing;
}}

fn sigterm_leaves_nothing(wiring: Wiring) {
    let lab = wiring.lab();
    let node = lab.host(Host::A);
    let before = configuration(node);
    let mut agent = Agent::start(&lab, Host::A, "primary", &wiring.settings());
    agent.wait_state("active");
    assert_ne!(
        configuration(node),
        before,
        "the agent does configure something"
    );
    assert_eq!(agent.terminate().code(), Some(0));
    assert_eq!(configuration(node), before);
}

fn an_address_that_the_operator_configured_stays_after_sigterm(wiring: Wiring) {
    let lab = wiring.lab();
    let node = lab.host(Host::A);
    node.sh(&format!("ip addr add {VIP}/24 dev eth0")).unwrap();
    let before = configuration(node);
    let mut agent = Agent::start(&lab, Host::A, "primary", &wiring.settings());
    agent.wait_state("active");
    assert_eq!(agent.terminate().code(), Some(0));
    assert_eq!(configuration(node), before);
}

fn cleanup_leaves_nothing(wiring: Wiring) {
    let lab = wiring.lab();
    let node = lab.host(Host::A);
    let before = configuration(node);
    let mut agent = Agent::start(&lab, Host::A, "primary", &wiring.settings());
    agent.wait_state("active");
    agent.kill9();
    agent.await_exit();
    assert_ne!(configuration(node), before, "the gate outlives the agent");
    let cleanup = agent.ask(&["cleanup"]);
    assert!(
        cleanup.status.success(),
        "{}",
        String::from_utf8_lossy(&cleanup.stderr)
    );
    assert_eq!(configuration(node), before);
    assert!(
        agent.ask(&["cleanup"]).status.success(),
        "a second time does nothing"
    );
}

fn a_restart_after_kill_9_leaves_one_gate_and_a_stop_then_leaves_none(wiring: Wiring) {
    let lab = wiring.lab();
    let node = lab.host(Host::A);
    let before = configuration(node);
    let mut agent = Agent::start(&lab, Host::A, "primary", &wiring.settings());
    agent.wait_state("active");
    agent.kill9();
    agent.await_exit();
    let mut agent = Agent::start(&lab, Host::A, "primary", &wiring.settings());
    agent.wait_state("active");
    let filters = node.sh("tc filter show dev eth0 egress").unwrap();
    assert_eq!(filters.matches(" name rfsis_gate ").count(), 1, "{filters}");
    assert_eq!(agent.terminate().code(), Some(0));
    assert_eq!(configuration(node), before);
}

fn a_dead_host_says_nothing_for_the_virtual_ip_though_its_kernel_is_asked(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    nc.echoes("the lease of the dead is over");

    let capture = Capture::start(&lab);
    let dead = lab.host(Host::A);
    let heard = || received_segments(dead);
    let before = heard();
    let wire = Wire::open(lab.client()).unwrap();
    // ARP for the VIP by everybody's broadcast, SYNs and stray segments to the dead host's own MAC:
    // its kernel has the address and the listeners still.
    lab.client()
        .sh(&format!("ip neigh flush to {VIP}"))
        .unwrap();
    for kind in malformed(Host::A) {
        wire.send(&kind.frame).unwrap();
    }
    for number in 0..20 {
        nc.echoes(&format!("line {number}"));
    }
    wait_until("its kernel to have got segments", heard, |&now| {
        now > before
    });
    let trace = capture.stop();
    assert_eq!(trace.from_vip_by(Host::A.mac()).count(), 0);
    assert!(trace.from_vip_by(Host::B.mac()).count() > 20);
}

/// TCP segments that the kernel of the namespace has received (RFC 2012, tcpInSegs).
fn received_segments(namespace: &Namespace) -> u64 {
    let counters = namespace
        .run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))
        .unwrap();
    let mut lines = counters.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let column = names.split(' ').position(|name| name == "InSegs").unwrap();
    values.split(' ').nth(column).unwrap().parse().unwrap()
}

fn a_standby_says_nothing_for_the_virtual_ip_from_its_first_moment_on(wiring: Wiring) {
    let lab = wiring.lab();
    let primary = Agent::start(&lab, Host::A, "primary", &wiring.settings());
    primary.wait_state("active");
    let capture = Capture::start(&lab);
    let backup = Agent::start(&lab, Host::B, "backup", &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    // An unresolved neighbour that is flushed refuses the connection that waits for it.
    nc.echoes("before");
    wait_until(
        "the backup to hear the primary",
        || backup.status(),
        |status| {
            lab.client()
                .sh(&format!("ip neigh flush to {VIP}"))
                .unwrap();
            nc.echoes("meanwhile");
            status
                .as_ref()
                .is_some_and(|status| status["peer"]["state"] == "active")
        },
    );
    let trace = capture.stop();
    assert_eq!(trace.from_vip_by(Host::B.mac()).count(), 0);
    trace.no_reset_from_vip().unwrap();
}

#[test]
fn a_metrics_port_in_use_stops_the_start_and_leaves_the_host_as_it_was_found() {
    let lab = Lab::new();
    let node = lab.host(Host::A);
    let before = configuration(node);
    let _holder = node
        .run(|| TcpListener::bind(("0.0.0.0", tests::agent::METRICS_PORT)))
        .unwrap();
    let mut agent = Agent::start(&lab, Host::A, "primary", &Settings::default());
    assert_eq!(agent.await_exit().code(), Some(1), "{}", agent.log());
    assert!(agent.log().contains("9500"), "{}", agent.log());
    assert_eq!(configuration(node), before);
}

on_each_wiring! { [on_a_lan: Lan, on_a_switch: Mirror] {
    an_address_that_the_operator_configured_stays_after_sigterm => super::an_address_that_the_operator_configured_stays_after_sigterm;
    a_restart_after_kill_9_leaves_one_gate_and_a_stop_then_leaves_none => super::a_restart_after_kill_9_leaves_one_gate_and_a_stop_then_leaves_none;
    a_dead_host_says_nothing_for_the_virtual_ip_though_its_kernel_is_asked => super::a_dead_host_says_nothing_for_the_virtual_ip_though_its_kernel_is_asked;
    a_standby_says_nothing_for_the_virtual_ip_from_its_first_moment_on => super::a_standby_says_nothing_for_the_virtual_ip_from_its_first_moment_on;
}}

/// RFC 826: who hears a request for its address answers it, with or without an agent.
#[test]
fn no_host_answers_the_heartbeats_of_an_active_that_is_alone() {
    const REQUEST: u16 = 1;
    const REPLY: u16 = 2;
    let wiring = Wiring::MirrorAsync;
    let (lab, settings) = (wiring.lab(), wiring.settings());
    let primary = Agent::start(&lab, Host::A, "primary", &settings);
    primary.wait_state("active");
    let wire = Wire::open(lab.host(Host::A)).unwrap();
    let (mut heartbeats, mut answers) = (0, 0);
    let heard = wire.hear(PATIENCE, |frame| {
        let arp = Arp::of(frame)?;
        if is_heartbeat_of(frame, Host::A) {
            assert_eq!((is_to_all(frame), arp.operation), (true, REPLY));
            heartbeats += 1;
        } else if frame[6..12] == Host::B.mac() && arp.target == Host::A.address() {
            answers += 1;
        }
        (heartbeats == 20).then_some(())
    });
    assert_eq!((heard.unwrap(), answers), (Some(()), 0));

    let _backup = Agent::start(&lab, Host::B, "backup", &settings);
    let to_the_peer = wire.hear(PATIENCE, |frame| {
        let alone = is_heartbeat_of(frame, Host::A) && !is_to_all(frame);
        alone.then(|| Arp::of(frame).unwrap().operation)
    });
    assert_eq!(to_the_peer.unwrap(), Some(REQUEST));
}

fn is_to_all(frame: &[u8]) -> bool {
    frame[..6] == [0xff; 6]
}
