//! A SYN flood on the VIP from the LAN.

use std::time::Duration;

use serde_json::Value;
use tests::agent::port;
use tests::capture::CapturedFrame;
use tests::flood::Flood;
use tests::patience::{wait_at_most, wait_until};
use tests::pulse::Pulse;
use tests::{Agent, Capture, Cluster, Host, Lab, Typist, Wiring};

const SYNS: u64 = 50_000;
const PER_SECOND: u64 = 10_000;
/// `shadow.max_flows`: slots of the active, and shadows.
const FLOWS: u64 = 20_000;
/// What a node may need for the flood, KiB: a shadow for each handshake at the takeover.
const MEMORY_KIB: u64 = 300 << 10;

fn show(agent: &Agent) -> Value {
    let status = agent.status().unwrap_or_default();
    println!(
        "{:?} {}: flows {}, protection {}, at risk {}, LIVE_FLOWS {}, GUARDED {}, {} MiB",
        agent.host(),
        status["state"],
        status["flows"],
        status["protection"],
        status["at_risk"],
        agent.live_flows().unwrap(),
        agent.guarded_flows().unwrap(),
        agent.resident_kib().unwrap() >> 10
    );
    status
}

fn is_bounded(cluster: &Cluster<'_>) {
    for agent in [cluster.active(), cluster.standby()] {
        let status = show(agent);
        let sum = |of: &Value, names: [&str; 3]| -> u64 {
            names.iter().filter_map(|&name| of[name].as_u64()).sum()
        };
        let slots = sum(&status["protection"], ["opening", "guarded", "exposed"]);
        assert!(slots <= FLOWS, "{status:#}");
        let shadows = sum(&status["flows"], ["handshake", "lockstep", "live"]);
        assert!(shadows <= FLOWS, "{status:#}");
        assert!(agent.resident_kib().unwrap() < MEMORY_KIB);
    }
}

/// Two connections across a flood and a kill in the middle of it, and new ones behind it; then `body`.
fn flooded(body: impl FnOnce(&Lab, &Cluster<'_>)) {
    let lab = Wiring::Mirror.lab();
    let mut cluster = Cluster::start(&lab, &Wiring::Mirror.settings());
    cluster.active().wait_not_degraded();
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    let pulse = Pulse::start(&lab).unwrap();
    cluster.wait_redundant(2, Duration::from_secs(20));
    let capture = Capture::start(&lab);
    let flood = Flood::start(&lab, Host::A, SYNS, PER_SECOND).unwrap();
    let sent = || flood.sent();
    wait_until("a part of the flood", sent, |&sent| sent >= SYNS / 2);
    nc.echoes("in the flood");
    is_bounded(&cluster);
    cluster.kill_active();
    cluster.active().wait_state("active");
    flood.aim(Host::B);
    nc.echoes("after the kill");
    pulse.beat_on(20);
    // Without a standby whatever opens is exposed, and nobody else knows of it.
    wait_until("most of the flood", sent, |&sent| sent >= SYNS * 9 / 10);
    let mut alone = Typist::tcp(&lab, port::ECHO);
    alone.echoes("opened in the flood");
    cluster.start_standby();
    assert_eq!(flood.finish().unwrap(), SYNS);
    let mut anew = Typist::tcp(&lab, port::ECHO);
    anew.echoes("opened after the flood");
    is_bounded(&cluster);
    wait_at_most(
        Duration::from_secs(60),
        "four guarded connections",
        || cluster.standby().status().unwrap_or_default(),
        |status| status["flows"]["lockstep"] == 4,
    );
    show(cluster.active());
    body(&lab, &cluster);
    let killed = cluster.kill_active();
    for nc in [&mut nc, &mut alone, &mut anew] {
        nc.echoes("after the second kill");
    }
    println!(
        "{:?} after the second kill; {:?}",
        killed.elapsed(),
        pulse.finish().unwrap()
    );
    let mut trace = capture.stop();
    // Of a handshake that was forgotten meanwhile the next node knows nothing, and answers anew.
    let client = Host::Client.address();
    let ours = |frame: &CapturedFrame| frame.tcp().is_none_or(|tcp| tcp.destination.0 == client);
    trace.frames.retain(ours);
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
}

#[test]
fn connections_survive_two_kills_in_and_after_a_syn_flood_and_new_ones_are_protected() {
    flooded(|_, _| {});
}

/// The kernel repeats a SYN-ACK for a minute, and a standby follows handshakes for two.
#[test]
#[ignore = "minutes: cargo xtask stress"]
fn what_a_syn_flood_took_is_given_back() {
    flooded(|_, cluster| {
        cluster.wait_redundant(4, Duration::from_secs(180));
        for agent in [cluster.active(), cluster.standby()] {
            show(agent);
        }
        assert_eq!(cluster.active().live_flows().unwrap(), 0);
        assert_eq!(cluster.active().guarded_flows().unwrap(), 4);
        assert_eq!(cluster.standby().live_flows().unwrap(), 4);
    });
}
