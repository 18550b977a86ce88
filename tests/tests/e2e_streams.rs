//! Bulk transfers across a kill in the middle, byte by byte.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tests::agent::port;
use tests::client::{chargen_exactly, connect, connect_narrow, echo_exactly};
use tests::patience::{PATIENCE, slowed, wait_at_most};
use tests::wire::Wire;
use tests::{Capture, Death, Host, Lab, LabOptions, Pair, VIP, Wiring, on_each_wiring};

/// Bytes of a whole transfer.
const TOTAL: u64 = 64 << 20;
/// A transfer may take this long to its middle on a slow, shared machine.
const TO_THE_MIDDLE: Duration = Duration::from_secs(120);

/// A lab whose client speaks TCP without one of its options.
fn lab_without(wiring: Wiring, option: Option<&'static str>) -> Lab {
    wiring.lab_with(LabOptions {
        client_sysctls: option.map(|key| (key, "0")).into_iter().collect(),
        ..LabOptions::default()
    })
}

/// Lets the primary die when half of the bytes have come back.
fn die_in_the_middle(lab: &Lab, pair: &Pair, progress: &AtomicU64) {
    wait_at_most(
        TO_THE_MIDDLE,
        "the middle of the transfer",
        || progress.load(Ordering::Relaxed),
        |&bytes| bytes >= TOTAL / 2,
    );
    pair.primary_dies(lab, Death::Kill9);
    assert!(
        progress.load(Ordering::Relaxed) < TOTAL,
        "it died in the middle"
    );
}

fn echo_is_exact(wiring: Wiring, without: Option<&'static str>) {
    let lab = lab_without(wiring, without);
    let pair = Pair::start(&lab, &wiring.settings());
    let stream = connect(&lab, port::ECHO).unwrap();
    let progress = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| echo_exactly(&stream, TOTAL, 1, &progress));
        die_in_the_middle(&lab, &pair, &progress);
        transfer.join().unwrap().unwrap();
    });
    pair.wait_takeover();
}

#[test]
fn echo_of_64_mib_is_byte_exact_without_timestamps() {
    echo_is_exact(Wiring::Lan, Some("ipv4/tcp_timestamps"));
}

#[test]
fn echo_of_64_mib_is_byte_exact_without_window_scaling() {
    echo_is_exact(Wiring::Lan, Some("ipv4/tcp_window_scaling"));
}

#[test]
fn echo_of_64_mib_is_byte_exact_without_sack() {
    echo_is_exact(Wiring::Lan, Some("ipv4/tcp_sack"));
}

fn chargen_is_exact(wiring: Wiring, without: Option<&'static str>) {
    let lab = lab_without(wiring, without);
    let pair = Pair::start(&lab, &wiring.settings());
    let stream = connect(&lab, port::CHARGEN).unwrap();
    let progress = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| chargen_exactly(&stream, 0, TOTAL, &progress));
        die_in_the_middle(&lab, &pair, &progress);
        transfer.join().unwrap().unwrap();
    });
    pair.wait_takeover();
}

#[test]
fn chargen_of_64_mib_is_byte_exact_without_timestamps() {
    chargen_is_exact(Wiring::Lan, Some("ipv4/tcp_timestamps"));
}

#[test]
fn chargen_of_64_mib_is_byte_exact_without_window_scaling() {
    chargen_is_exact(Wiring::Lan, Some("ipv4/tcp_window_scaling"));
}

#[test]
fn chargen_of_64_mib_is_byte_exact_without_sack() {
    chargen_is_exact(Wiring::Lan, Some("ipv4/tcp_sack"));
}

fn a_reader_with_a_closed_window_goes_on_after_the_takeover(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let wire = Wire::open(lab.client()).unwrap();
    let stream = connect_narrow(&lab, port::CHARGEN, 64 << 10).unwrap();
    let closed = wire.hear(slowed(PATIENCE), |frame| {
        let frame = tests::capture::CapturedFrame {
            at: std::time::UNIX_EPOCH,
            bytes: frame.to_vec(),
        };
        let segment = frame.tcp()?;
        (segment.destination.0 == VIP && segment.window == 0).then_some(())
    });
    assert_eq!(closed.unwrap(), Some(()), "the client's window is closed");
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    chargen_exactly(&stream, 0, TOTAL, &AtomicU64::new(0)).unwrap();
}

on_each_wiring! { [lan: Lan, mirror: Mirror, mirror_offloaded: MirrorOffloaded] {
    echo_of_64_mib_is_byte_exact_across_a_kill => |wiring| echo_is_exact(wiring, None);
    chargen_of_64_mib_is_byte_exact_across_a_kill => |wiring| chargen_is_exact(wiring, None);
}}

on_each_wiring! { [mirror_over_a_sync_link: MirrorOverSyncLink] {
    echo_of_64_mib_is_byte_exact_across_a_kill => |wiring| echo_is_exact(wiring, None);
}}

on_each_wiring! { [captured_on_the_lan: Lan, captured_with_a_mirror: Mirror] {
    no_reset_and_no_changed_byte_in_a_transfer_across_a_kill => wire_is_clean;
}}

fn wire_is_clean(wiring: Wiring) {
    // Less than elsewhere: every frame is kept.
    const CAPTURED: u64 = 8 << 20;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let capture = Capture::start(&lab);
    let (echo, chargen) = (
        connect(&lab, port::ECHO).unwrap(),
        connect(&lab, port::CHARGEN).unwrap(),
    );
    let (echoed, generated) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let transfers = [
            scope.spawn(|| echo_exactly(&echo, CAPTURED, 2, &echoed)),
            scope.spawn(|| chargen_exactly(&chargen, 0, CAPTURED, &generated)),
        ];
        wait_at_most(
            TO_THE_MIDDLE,
            "both transfers to be under way",
            || [&echoed, &generated].map(|progress| progress.load(Ordering::Relaxed)),
            |bytes| bytes.iter().all(|&bytes| bytes > CAPTURED / 8),
        );
        pair.primary_dies(&lab, Death::Kill9);
        for transfer in transfers {
            transfer.join().unwrap().unwrap();
        }
    });
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    trace
        .dead_host_is_silent(Host::A.mac(), Host::B.mac())
        .unwrap();
}

on_each_wiring! { [on_a_lan: Lan, on_a_switch: Mirror] {
    a_reader_with_a_closed_window_goes_on_after_the_takeover => super::a_reader_with_a_closed_window_goes_on_after_the_takeover;
}}
