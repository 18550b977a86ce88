//! What is particular to tap `mirror`. That sessions survive with it, the other files show.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::net::Shutdown;
use std::sync::atomic::AtomicU64;

use tests::agent::port;
use tests::client::{chargen_exactly, connect, echo_exactly};
use tests::forge::malformed;
use tests::lab::SYNC_INTERFACE;
use tests::patience::wait_until;
use tests::wire::Wire;
use tests::{Agent, Bridge, Capture, Death, Host, Lab, LabOptions, Pair, Settings, Typist, Wiring};

const COPIES: &str = "rfsis_mirror_packets_total";
const CLONED: [(&str, &str); 1] = [("verdict", "cloned")];
const NO_STANDBY: [(&str, &str); 1] = [("verdict", "no_standby")];
const FOREIGN: [(&str, &str); 1] = [("result", "foreign")];

/// The active copies once it hears the standby, which takes copies once it hears the active.
#[track_caller]
fn wait_until_they_hear_each_other(pair: &Pair) {
    for agent in [&pair.primary, &pair.backup] {
        agent.wait_status("a peer", |status| {
            let states = [&status["state"], &status["peer"]["state"]];
            states.contains(&&"active".into()) && states.contains(&&"standby".into())
        });
        agent.wait_not_degraded();
    }
}

#[test]
fn a_switch_shows_the_client_no_copy_and_the_metrics_count_them() {
    let wiring = Wiring::MirrorAsync;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let capture = Capture::start(&lab);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("copied");
    pair.backup.wait_flows("lockstep", 1);
    let trace = capture.stop();
    let speaks_of_vip = trace.frames.iter().filter(|frame| frame.tcp().is_some());
    let addressed_to = |mac: [u8; 6]| {
        let frames = speaks_of_vip.clone();
        frames.filter(|frame| frame.bytes[..6] == mac).count()
    };
    assert_eq!(
        addressed_to(Host::B.mac()),
        0,
        "the copies are the standby's"
    );
    assert!(addressed_to(Host::A.mac()) > 0 && addressed_to(Host::Client.mac()) > 0);
    let segments = trace.segments_from_vip().count() as u64;
    assert!(segments >= 2, "SYN-ACK and echo");

    let scrape = pair.primary.metrics();
    let both_ways = addressed_to(Host::A.mac()) + addressed_to(Host::Client.mac());
    assert!(scrape.sum(COPIES, &CLONED) >= both_ways as f64);
    assert_eq!(scrape.sum(COPIES, &[("verdict", "failed")]), 0.0);
    let fed = pair.backup.metrics();
    assert!(fed.sum("rfsis_frames_total", &[("result", "ok")]) > 0.0);
    assert!(fed.sum("rfsis_frames_total", &[("result", "from_active")]) > 0.0);
    assert_eq!(pair.backup.metrics().sum(COPIES, &CLONED), 0.0);
}

#[test]
fn super_frames_reach_the_standby_whole_and_with_good_checksums() {
    let (fed, segments) = copies_of_super_frames(false);
    // 65,160 bytes each, those that were not split by a window.
    assert!(fed < segments / 4.0, "{fed} of {segments}");
}

/// A veth whose end has XDP gets none.
#[test]
fn with_native_xdp_copies_of_super_frames_reach_the_standby_as_segments_with_good_checksums() {
    let (fed, segments) = copies_of_super_frames(true);
    assert!(fed >= segments, "{fed} of {segments}");
}

/// Echoes some MiB with offloads on: how many frames the standby's shadows were fed, and how many full
/// segments the bytes make, both ways.
fn copies_of_super_frames(native_xdp: bool) -> (f64, f64) {
    const TOTAL: u64 = 8 << 20;
    let wiring = Wiring::MirrorOffloaded;
    let lab = wiring.lab();
    // So that what the active sends is copied, too.
    let settings = Settings {
        sync: false,
        native_xdp,
        ..wiring.settings()
    };
    let pair = Pair::start(&lab, &settings);
    let stream = connect(&lab, port::ECHO).unwrap();
    let progress = AtomicU64::new(0);
    let copied = || pair.primary.metrics().sum(COPIES, &CLONED);
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| echo_exactly(&stream, TOTAL, 1, &progress));
        transfer.join().unwrap().unwrap();
    });
    // Both ways, at 1448 bytes a segment: so few copies only if most were of super-frames.
    let segments = (2 * TOTAL / 1448) as f64;
    assert!(copied() < segments, "{} of {segments}", copied());
    // Without confirmations nobody has waited for the last of them; and some may have been lost, which is counted.
    let lost = || {
        let full = [Host::A, Host::B].map(|host| lab.lost_from(host) + lab.lost_towards(host));
        let standby = pair.backup.metrics();
        let dropped = standby.sum("rfsis_ring_dropped_total", &[("ring", "frames")]);
        full.iter().sum::<u64>() as f64 + dropped
    };
    let fed = |result| {
        let standby = pair.backup.metrics();
        standby.sum("rfsis_frames_total", &[("result", result)])
    };
    let arrived = || fed("ok") + fed("from_active") + lost();
    let wanted = if native_xdp { segments } else { copied() };
    let arrived = wait_until("all copies", arrived, |&count| count >= wanted);
    assert_eq!((fed("bad_checksum"), fed("malformed")), (0.0, 0.0));
    (arrived, segments)
}

#[test]
fn what_a_flooding_bridge_brings_besides_the_copies_is_foreign_and_harmless() {
    let lab = Lab::with(&LabOptions {
        bridge: Bridge::Flooding,
        ..LabOptions::default()
    });
    let pair = Pair::start(&lab, &Wiring::Mirror.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("everything comes twice");
    pair.backup.wait_flows("lockstep", 1);
    let wire = Wire::open(lab.client()).unwrap();
    let before = pair.backup.metrics().sum("rfsis_frames_total", &FOREIGN);
    assert!(before > 0.0, "the originals");
    // Forged as if they were copies, but for the sender.
    for kind in malformed(Host::B) {
        wire.send(&kind.frame).unwrap();
    }
    pair.backup
        .wait_metric("rfsis_frames_total", &FOREIGN, before + 5.0);
    nc.echoes("still");
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    nc.echoes("and now from the shadow");
    assert!(nc.hang_up().success());
}

#[test]
fn copying_ends_with_the_standby_and_begins_again_with_the_next() {
    let wiring = Wiring::Mirror;
    let lab = wiring.lab();
    let settings = wiring.settings();
    let mut pair = Pair::start(&lab, &settings);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("copied");
    pair.backup.kill9();
    pair.backup.await_exit();
    pair.primary
        .wait_status("alone", |status| status["ready"] == false);
    nc.echoes("copied to nobody");
    pair.primary.wait_metric(COPIES, &NO_STANDBY, 1.0);
    let alone = pair.primary.metrics().sum(COPIES, &CLONED);
    nc.echoes("nor this");
    assert_eq!(pair.primary.metrics().sum(COPIES, &CLONED), alone);

    pair.backup = Agent::start(&lab, Host::B, "backup", &settings);
    wait_until_they_hear_each_other(&pair);
    let mut second = Typist::tcp(&lab, port::ECHO);
    second.echoes("copied again");
    // And the older flow has joined late.
    let status = pair.backup.wait_flows("lockstep", 2);
    assert_eq!(status["flows"]["unprotected"], 0, "{status}");
    let late_joins = "rfsis_late_joins_total";
    let joined = [("result", "joined")];
    let scrape = pair.primary.wait_metric(late_joins, &joined, 1.0);
    assert_eq!(
        scrape.sum(late_joins, &[]),
        1.0,
        "the newer was never unknown"
    );
    let alone = scrape.sum(COPIES, &CLONED);
    nc.echoes("copied to the next");
    pair.primary.wait_metric(COPIES, &CLONED, alone + 1.0);
}

#[test]
fn a_flow_that_stays_on_a_shadow_is_unprotected_at_the_standby_that_came_back() {
    let wiring = Wiring::Mirror;
    let lab = wiring.lab();
    let settings = wiring.settings();
    let mut pair = Pair::start(&lab, &settings);
    let half_closed = connect(&lab, port::CHARGEN).unwrap();
    half_closed.shutdown(Shutdown::Write).unwrap();
    let reads = |from| chargen_exactly(&half_closed, from, 1000, &AtomicU64::new(0)).unwrap();
    reads(0);
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    reads(1000);
    pair.primary.await_exit();
    pair.primary = Agent::start(&lab, Host::A, "primary", &settings);
    wait_until_they_hear_each_other(&pair);
    // Only the shadow's half of it is copied.
    reads(2000);
    pair.primary.wait_flows("unprotected", 1);
    let mut second = Typist::tcp(&lab, port::ECHO);
    second.echoes("served by the kernel");
    let flows = pair.primary.wait_flows("lockstep", 1);
    assert_eq!(flows["flows"]["unprotected"], 1);
    reads(3000);

    // The new connection is held by the old primary now: it survives the second death too.
    pair.backup.kill9();
    second.echoes("served by its shadow");
    pair.primary.wait_state("active");
    assert!(second.is_connected());
}

#[test]
fn with_a_sync_interface_all_copies_go_over_it() {
    let wiring = Wiring::MirrorOverSyncLink;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let received = || {
        let file = format!("/sys/class/net/{SYNC_INTERFACE}/statistics/rx_packets");
        let count = lab.host(Host::B).sh(&format!("cat {file}")).unwrap();
        count.trim().parse::<u64>().unwrap()
    };
    let before = received();
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("over the other cable");
    pair.backup.wait_flows("lockstep", 1);
    let cloned = pair.primary.metrics().sum(COPIES, &CLONED) as u64;
    assert!(cloned >= 5, "{cloned}: handshake and echo, both ways");
    let on_the_cable = received() - before;
    assert!(on_the_cable >= cloned, "{on_the_cable} of {cloned}");
    // On the LAN the copies would be foreign.
    let foreign = pair.backup.metrics().sum("rfsis_frames_total", &FOREIGN);
    assert_eq!(foreign, 0.0);
}
