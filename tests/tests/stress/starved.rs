//! Every core has more to do than it can.

use std::time::Duration;

use tests::agent::port;
use tests::busy::Busy;
use tests::pulse::Pulse;
use tests::{Capture, Cluster, Failover, Host, Settings, Typist, Wiring};

/// Until all is protected again, on cores with so much else to do.
const TO_REPAIR: Duration = Duration::from_secs(60);
/// Busy loops on each core, beside the clients, both nodes and the LAN.
const LOOPS: usize = 4;

/// Only deaths and hangs move the VIP, and no client notices more than a pause.
fn fails_over_when_something_fails(settings: &Settings, ways: &[Failover], beats: u64) {
    let lab = Wiring::Mirror.lab();
    let mut cluster = Cluster::start(&lab, settings);
    let capture = Capture::start(&lab);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("typed once");
    let pulse = Pulse::start(&lab).unwrap();
    let busy = Busy::cores(LOOPS);
    cluster.wait_redundant(2, TO_REPAIR);
    for &how in ways {
        pulse.beat_on(beats);
        cluster.fail_over(how);
        nc.echoes("typed on");
        cluster.wait_redundant(2, TO_REPAIR);
    }
    pulse.beat_on(beats);
    let epoch = cluster.active().status().unwrap()["epoch"].as_u64();
    drop(busy);
    let blackout = pulse.finish().unwrap();
    println!("{} failovers, epoch {epoch:?}, {blackout:?}", ways.len());
    assert_eq!(
        epoch,
        Some(1 + ways.len() as u64),
        "a takeover that nothing called for"
    );
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    let nodes = [Host::A.mac(), Host::B.mac()].into_iter().cycle();
    let voices: Vec<_> = nodes.take(ways.len() + 1).collect();
    assert_eq!(trace.voices(), voices);
}

#[test]
fn with_every_core_busy_the_vip_moves_when_the_active_dies_or_hangs_and_never_else() {
    let ways = [Failover::Kill9, Failover::Hang, Failover::Kill9];
    fails_over_when_something_fails(&Wiring::Mirror.settings(), &ways, 500);
}

/// The default deadline.
#[test]
#[ignore = "minutes: cargo xtask stress"]
fn with_every_core_busy_and_30_ms_of_patience_only_deaths_and_hangs_move_the_vip() {
    let settings = Settings {
        interval: "10ms".into(),
        missed: 3,
        ..Wiring::Mirror.settings()
    };
    let ways = [Failover::Kill9, Failover::Hang].repeat(10);
    fails_over_when_something_fails(&settings, &ways, 2_000);
}
