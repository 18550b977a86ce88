//! One failover is a demo: a connection that was opened once survives any number of them, and the node that was
//! repaired protects it each time.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::time::Duration;

use tests::agent::port;
use tests::cluster::seed;
use tests::patience::slowed;
use tests::pulse::Pulse;
use tests::{Capture, Cluster, Failover, Host, Typist, Wiring, on_each_wiring};

/// From the old active's return until all is protected again, with a few flows.
const TO_REPAIR: Duration = Duration::from_secs(20);

/// Who is heard for the VIP in this many failovers from node a on.
fn alternating(failovers: usize) -> Vec<[u8; 6]> {
    let nodes = [Host::A.mac(), Host::B.mac()];
    nodes.into_iter().cycle().take(failovers + 1).collect()
}

/// An `nc` session and an echo at 1 kHz across these failovers.
fn two_connections_survive(wiring: Wiring, ways: &[Failover]) {
    let lab = wiring.lab();
    let mut cluster = Cluster::start(&lab, &wiring.settings());
    cluster.active().wait_not_degraded();
    let capture = Capture::start(&lab);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("typed once");
    let pulse = Pulse::start(&lab).unwrap();
    cluster.wait_redundant(2, slowed(TO_REPAIR));
    for (turn, &how) in ways.iter().enumerate() {
        eprintln!("failover {turn}: {how:?}");
        pulse.beat_on(20);
        nc.type_line("typed before").unwrap();
        cluster.fail_over(how);
        assert_eq!(
            nc.read_line(slowed(TO_REPAIR)).as_deref(),
            Some("typed before")
        );
        nc.echoes("typed after");
        pulse.beat_on(20);
        cluster.wait_redundant(2, slowed(TO_REPAIR));
    }
    nc.echoes("typed last");
    assert!(nc.hang_up().success());
    pulse.finish().unwrap();
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    assert_eq!(trace.voices(), alternating(ways.len()));
}

fn there_and_back_by_two_kills(wiring: Wiring) {
    two_connections_survive(wiring, &[Failover::Kill9; 2]);
}

fn twenty_failovers_of_every_kind(wiring: Wiring) {
    let seed = seed();
    eprintln!("RFSIS_TEST_SEED={seed}");
    two_connections_survive(wiring, &Failover::shuffled(20, seed));
}

on_each_wiring! { [mirror: Mirror, mirror_offloaded: MirrorOffloaded] {
    there_and_back_by_two_kills => super::there_and_back_by_two_kills;
}}

on_each_wiring! { [on_a_switch: Mirror] {
    twenty_failovers_of_every_kind => super::twenty_failovers_of_every_kind;
}}
