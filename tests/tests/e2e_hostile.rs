//! Hostile and broken frames: counted, ignored, without effect.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tests::agent::port;
use tests::forge::{Forgery, is_heartbeat_of, malformed};
use tests::patience::{PATIENCE, slowed};
use tests::wire::Wire;
use tests::{Agent, Death, Host, Lab, Pair, Settings, Typist, Wiring, on_each_wiring};

/// The next genuine heartbeat of a host.
fn heartbeat(wire: &Wire, of: Host) -> Vec<u8> {
    wire.hear(slowed(PATIENCE), |frame| {
        is_heartbeat_of(frame, of).then(|| frame.to_vec())
    })
    .unwrap()
    .expect("a heartbeat on the wire")
}

/// How many heartbeats an agent has refused for this reason.
fn refused(agent: &Agent, result: &str) -> f64 {
    let labels = [("direction", "received"), ("result", result)];
    agent.metrics().sum("rfsis_heartbeats_total", &labels)
}

/// Sends frames to the backup as if from the primary, and waits until each was refused for
/// `reason`; then checks that nothing else came of it.
fn assert_refused(result: &str, forge: impl Fn(&[u8], u64, &Settings) -> Vec<u8>) {
    const FRAMES: u64 = 20;
    let lab = Lab::new();
    let settings = Settings::default();
    let pair = Pair::start(&lab, &settings);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    let before = pair.backup.wait_flows("lockstep", 1);
    let refused_before = refused(&pair.backup, result);

    let wire = Wire::open(lab.client()).unwrap();
    let genuine = heartbeat(&wire, Host::A);
    // What is replayed must be older than something that the backup has accepted.
    heartbeat(&wire, Host::A);
    for number in 0..FRAMES {
        wire.send(&forge(&genuine, number, &settings)).unwrap();
    }
    let labels = [("direction", "received"), ("result", result)];
    let least = refused_before + FRAMES as f64;
    pair.backup
        .wait_metric("rfsis_heartbeats_total", &labels, least);

    let after = pair.backup.status().unwrap();
    for field in ["state", "epoch", "failovers"] {
        assert_eq!(after[field], before[field], "{field} after {result}");
    }
    assert_eq!(after["peer"]["state"], "active");
    assert_eq!(after["peer"]["epoch"], before["peer"]["epoch"]);
    assert_eq!(
        pair.primary.wait_state("active")["failovers"],
        before["failovers"]
    );
    nc.echoes("after");
}

#[test]
fn heartbeats_forged_without_the_key_are_counted_and_ignored() {
    assert_refused("bad_mac", |genuine, number, _| {
        Forgery::of(genuine)
            .active_in(1_000 + number)
            .later_by(1_000 + number)
            .signed("another key, of 32 bytes or more")
            .frame()
    });
}

#[test]
fn replayed_heartbeats_are_counted_and_ignored() {
    assert_refused("stale", |genuine, _, _| genuine.to_vec());
}

#[test]
fn heartbeats_of_another_cluster_are_counted_and_ignored() {
    assert_refused("wrong_cluster", |genuine, number, settings| {
        Forgery::of(genuine)
            .of_cluster("somebody else's")
            .active_in(1_000 + number)
            .later_by(1_000 + number)
            .signed(&settings.key)
            .frame()
    });
}

#[test]
fn truncated_heartbeats_are_counted_and_ignored() {
    assert_refused("truncated", |genuine, number, _| {
        Forgery::of(genuine)
            .later_by(1_000)
            .cut_by(1 + number as usize)
    });
}

/// The control of the forgeries: with the key they would be believed, so it is the check that
/// refuses them and not a mistake in how they are made.
#[test]
fn a_heartbeat_signed_with_the_key_is_believed() {
    let lab = Lab::new();
    let settings = Settings::default();
    let pair = Pair::start(&lab, &settings);
    let wire = Wire::open(lab.client()).unwrap();
    let epoch = pair.backup.status().unwrap()["epoch"].as_u64().unwrap();
    let forged = Forgery::of(&heartbeat(&wire, Host::A))
        .active_in(epoch + 7)
        .later_by(1_000_000)
        .signed(&settings.key)
        .frame();
    wire.send(&forged).unwrap();
    pair.backup.wait_status("the forged epoch", |status| {
        status["peer"]["epoch"] == epoch + 7 || status["epoch"].as_u64() > Some(epoch)
    });
}

#[test]
fn replaying_the_dead_primarys_last_heartbeats_does_not_delay_the_takeover() {
    let lab = Lab::new();
    let pair = Pair::start(&lab, &Settings::heartbeat("20ms", 10));
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    let wire = Wire::open(lab.client()).unwrap();
    let mut last: Vec<Vec<u8>> = (0..20).map(|_| heartbeat(&wire, Host::A)).collect();
    let died = pair.primary_dies(&lab, Death::Kill9);
    let rest = |frame: &[u8]| is_heartbeat_of(frame, Host::A).then(|| frame.to_vec());
    while let Some(frame) = wire.hear(Duration::from_millis(60), rest).unwrap() {
        last.push(frame);
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for frame in last.iter().cycle() {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                wire.send(frame).unwrap();
            }
        });
        pair.wait_takeover();
        over.store(true, Ordering::Relaxed);
    });
    // 200 ms are due; the flood would have gone on for ever.
    assert!(
        died.elapsed() < Duration::from_secs(5),
        "{:?}",
        died.elapsed()
    );
    nc.echoes("after");
    let stale = refused(&pair.backup, "stale") + refused(&pair.backup, "lost");
    assert!(stale > 0.0, "the replay arrived");
}

fn malformed_frames_crash_nothing_and_are_counted_while_flows_go_on(wiring: Wiring) {
    const REPEATS: usize = 20;
    let lab = wiring.lab();
    let mut pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    let wire = Wire::open(lab.client()).unwrap();
    let before = [&pair.primary, &pair.backup].map(Agent::metrics);
    for host in [Host::A, Host::B] {
        for kind in malformed(host) {
            for _ in 0..REPEATS {
                wire.send(&kind.frame)
                    .unwrap_or_else(|error| panic!("{}: {error:#}", kind.name));
            }
        }
        nc.echoes("in between");
    }
    for (agent, before) in [&pair.primary, &pair.backup].into_iter().zip(&before) {
        for verdict in ["malformed", "tagged"] {
            let labels = [("verdict", verdict)];
            let count = before.sum("rfsis_xdp_packets_total", &labels);
            agent.wait_metric("rfsis_xdp_packets_total", &labels, count + REPEATS as f64);
        }
    }
    let bad_checksum = [("result", "bad_checksum")];
    let count = before[1].sum("rfsis_frames_total", &bad_checksum);
    pair.backup
        .wait_metric("rfsis_frames_total", &bad_checksum, count + REPEATS as f64);
    for (agent, state) in [(&mut pair.primary, "active"), (&mut pair.backup, "standby")] {
        assert!(agent.is_running());
        assert_eq!(agent.status().unwrap()["state"], state);
    }
    pair.primary_dies(&lab, Death::Kill9);
    nc.echoes("after the takeover");
    for kind in malformed(Host::B) {
        wire.send(&kind.frame).unwrap();
    }
    nc.echoes("to a live shadow");
    assert!(pair.backup.is_running());
}

on_each_wiring! { [on_a_lan: Lan, on_a_switch: Mirror] {
    malformed_frames_crash_nothing_and_are_counted_while_flows_go_on => super::malformed_frames_crash_nothing_and_are_counted_while_flows_go_on;
}}
