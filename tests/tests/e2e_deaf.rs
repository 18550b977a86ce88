//! A standby that the active no longer reaches on the sync channel: the gate opens, and clients are told of
//! bytes without its word. What it lacks of them it must not pretend to have.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use tests::agent::port;
use tests::client::{connect, hears, says};
use tests::faults::{Fault, Traffic};
use tests::patience::{slowed, wait_until};
use tests::{Death, Host, Lab, Pair, Wiring};

/// To be told at once, and to be told when the client has been asked for some seconds and repeated nothing.
const AT_ONCE: Duration = Duration::from_secs(3);
const WHEN_ASKED: Duration = Duration::from_secs(15);

const SYNC: [Traffic; 2] = [Traffic::Openings, Traffic::Confirmations];

fn lose(lab: &Lab, traffic: &[Traffic]) {
    let faults: Vec<_> = traffic
        .iter()
        .map(|&kind| Fault::loses(kind, 100))
        .collect();
    lab.suffer(&faults);
}

fn echoes(stream: &TcpStream, seed: u64) {
    says(stream, seed).unwrap();
    hears(stream, seed).unwrap();
}

/// The client only waits, and is told.
#[track_caller]
fn is_reset_within(mut stream: &TcpStream, limit: Duration) {
    let asked = Instant::now();
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    let took = asked.elapsed();
    assert!(took < slowed(limit), "after {took:?}");
}

/// Heartbeats and copies go on, the sync channel is cut, and the active says so.
fn cut_off(lab: &Lab) -> (Pair, TcpStream) {
    let pair = Pair::start_guarding(lab, &Wiring::Mirror.settings());
    let older = connect(lab, port::ECHO).unwrap();
    echoes(&older, 1);
    pair.backup.wait_flows("lockstep", 1);
    lose(lab, &SYNC);
    pair.primary.wait_protection("degraded");
    echoes(&older, 2);
    (pair, older)
}

#[test]
fn what_a_deaf_standby_has_goes_on_and_who_waits_for_what_it_lacks_is_told() {
    let lab = Wiring::Mirror.lab();
    let (pair, complete) = cut_off(&lab);
    // Copied, and nobody said that the active waits for it.
    let unasked = connect(&lab, port::ECHO).unwrap();
    echoes(&unasked, 3);
    let incomplete = connect(&lab, port::ECHO).unwrap();
    lab.heal();
    pair.primary.wait_protection("sync");
    let guarded = [("condition", "guarded")];
    pair.primary
        .wait_metric("rfsis_guarded_flows", &guarded, 3.0);
    lose(&lab, &SYNC);
    pair.primary.wait_protection("degraded");
    let unguarded = connect(&lab, port::ECHO).unwrap();
    echoes(&unguarded, 4);
    pair.backup.wait_flows("unprotected", 1);
    // Answered by the active alone.
    lose(&lab, &[SYNC[0], SYNC[1], Traffic::Copies]);
    echoes(&incomplete, 5);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    is_reset_within(&unguarded, AT_ONCE);
    is_reset_within(&incomplete, WHEN_ASKED);
    for (stream, seed) in [(&complete, 6), (&unasked, 7)] {
        echoes(stream, seed);
    }
}

/// So soon, mostly, that no heartbeat has come in between.
#[test]
fn who_waits_for_what_an_active_said_just_before_its_death_is_told() {
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &Wiring::Mirror.settings());
    let incomplete = connect(&lab, port::ECHO).unwrap();
    echoes(&incomplete, 1);
    pair.backup.wait_flows("lockstep", 1);
    lose(&lab, &SYNC);
    pair.primary.wait_protection("degraded");
    lose(&lab, &[SYNC[0], SYNC[1], Traffic::Copies]);
    echoes(&incomplete, 2);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    is_reset_within(&incomplete, WHEN_ASKED);
}

/// What the active says while the standby's cable is out the standby cannot know, nor when the active died.
#[test]
fn who_waits_for_what_an_active_said_while_the_standby_had_no_cable_is_told() {
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &Wiring::Mirror.settings());
    let incomplete = connect(&lab, port::ECHO).unwrap();
    echoes(&incomplete, 1);
    pair.backup.wait_flows("lockstep", 1);
    lab.cut(Host::B);
    pair.primary.wait_protection("degraded");
    echoes(&incomplete, 2);
    pair.primary_dies(&lab, Death::Kill9);
    assert_eq!(pair.backup.status().unwrap()["state"], "standby");
    lab.mend(Host::B);
    pair.wait_takeover();
    is_reset_within(&incomplete, WHEN_ASKED);
}

/// A switch that drops frames with a foreign source address: heartbeats and confirmations come through.
#[test]
fn a_client_of_whom_no_copy_comes_does_not_wait_for_good_and_is_protected_once_they_come() {
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &Wiring::Mirror.settings());
    let client = connect(&lab, port::ECHO).unwrap();
    echoes(&client, 1);
    lose(&lab, &[Traffic::Copies]);
    echoes(&client, 2);
    pair.primary
        .wait_metric("rfsis_guard_stuck_total", &[], 1.0);
    lab.heal();
    echoes(&client, 3);
    let guarded = [("condition", "guarded")];
    pair.primary
        .wait_metric("rfsis_guarded_flows", &guarded, 1.0);
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    echoes(&client, 4);
}

#[test]
fn a_standby_that_hears_again_has_all_flows_as_before() {
    let lab = Wiring::Mirror.lab();
    let (pair, older) = cut_off(&lab);
    let newer = connect(&lab, port::ECHO).unwrap();
    echoes(&newer, 3);
    lab.heal();
    pair.primary.wait_protection("sync");
    let guarded = || {
        let scrape = pair.primary.metrics();
        scrape.sum("rfsis_guarded_flows", &[("condition", "guarded")])
    };
    wait_until("both guarded again", guarded, |&count| count == 2.0);
    pair.backup.wait_flows("lockstep", 2);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    for (stream, seed) in [(&older, 4), (&newer, 5)] {
        echoes(stream, seed);
    }
    // Not given up later, either.
    std::thread::sleep(slowed(Duration::from_secs(7)));
    for (stream, seed) in [(&older, 6), (&newer, 7)] {
        echoes(stream, seed);
    }
}
