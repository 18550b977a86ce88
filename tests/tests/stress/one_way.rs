//! The way between the nodes is cut in one direction only.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tests::agent::port;
use tests::client::{connect, echo_exactly};
use tests::faults::{Fault, Traffic};
use tests::patience::{PATIENCE, slowed, wait_until};
use tests::pulse::Pulse;
use tests::{Capture, Death, Host, Lab, Pair, Typist, Wiring};

/// Heartbeats that the other node sends while nothing may change: many deadlines.
const A_WHILE: f64 = 40.0;

fn lost(kinds: &[Traffic]) -> Vec<Fault> {
    kinds.iter().map(|&kind| Fault::loses(kind, 100)).collect()
}

/// In which an active has heard that it is outranked, or its lease has lapsed: with the settings of these tests.
const TAKEOVER_TIME: Duration = Duration::from_millis(300);

/// Waits until both nodes have sent so many heartbeats that each deadline has passed several times.
fn let_deadlines_pass(pair: &Pair) {
    for agent in [&pair.primary, &pair.backup] {
        let sent = [("direction", "sent"), ("result", "ok")];
        let now = agent.metrics().sum("rfsis_heartbeats_total", &sent);
        agent.wait_metric("rfsis_heartbeats_total", &sent, now + A_WHILE);
    }
}

/// More than any window, in both directions: nobody waits for a word that cannot come.
fn transfers(lab: &Lab) {
    let stream = connect(lab, port::ECHO).unwrap();
    echo_exactly(&stream, 4 << 20, 7, &AtomicU64::new(0)).unwrap();
}

/// The standby no longer hears the active, which hears it: it takes over, and the other yields.
fn an_active_that_is_not_heard_yields(kinds: &[Traffic]) {
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &Wiring::Mirror.settings());
    let capture = Capture::start(&lab);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    let pulse = Pulse::start(&lab).unwrap();
    pulse.beat_on(20);
    pair.backup.wait_flows("lockstep", 2);
    lab.suffer(&lost(kinds));
    nc.type_line("into the cut").unwrap();
    pair.wait_takeover();
    assert_eq!(
        nc.read_line(slowed(PATIENCE)).as_deref(),
        Some("into the cut")
    );
    assert_eq!(pair.wait_one_active().host(), Host::B);
    pulse.beat_on(20);
    transfers(&lab);
    let_deadlines_pass(&pair);
    lab.heal();
    let_deadlines_pass(&pair);
    pulse.beat_on(20);
    nc.echoes("after");
    assert_eq!(pair.wait_one_active().host(), Host::B);
    assert_eq!(pair.backup.status().unwrap()["epoch"], 2);
    println!("{:?}", pulse.finish().unwrap());
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    // An active that lives is answering while the other's claim is on its way.
    let overlap = trace.overlap(Host::A.mac(), Host::B.mac()).unwrap();
    assert!(overlap < slowed(TAKEOVER_TIME), "{overlap:?}");
    println!("two spoke for {overlap:?}");
}

#[test]
fn an_active_whose_heartbeats_are_lost_yields_to_the_standby_that_it_hears() {
    an_active_that_is_not_heard_yields(&[Traffic::HeartbeatsOfA]);
}

#[test]
fn an_active_of_which_the_standby_gets_nothing_yields_to_it() {
    an_active_that_is_not_heard_yields(&[Traffic::HeartbeatsOfA, Traffic::AllToB]);
}

/// The active no longer hears the standby, which hears it: nothing moves, and its death is still survived.
fn a_standby_that_is_not_heard_waits(kinds: &[Traffic], is_protected: bool) {
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &Wiring::Mirror.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    lab.suffer(&lost(kinds));
    nc.echoes("into the cut");
    let_deadlines_pass(&pair);
    let status = pair
        .primary
        .wait_status("not ready", |status| status["ready"] == false);
    assert_eq!(
        (&status["state"], &status["epoch"]),
        (&"active".into(), &1.into())
    );
    let other = pair.backup.status().unwrap();
    assert_eq!(
        (&other["state"], &other["epoch"]),
        (&"standby".into(), &1.into())
    );
    nc.echoes("in the cut");
    let mut opened = Typist::tcp(&lab, port::ECHO);
    opened.echoes("opened in the cut");
    transfers(&lab);
    if !is_protected {
        lab.heal();
        let guarded = || {
            pair.primary
                .metrics()
                .sum("rfsis_guarded_flows", &[("condition", "guarded")])
        };
        wait_until("both guarded again", guarded, |&count| count == 2.0);
    }
    pair.backup.wait_flows("lockstep", 2);
    let capture = Capture::start(&lab);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    nc.echoes("after");
    opened.echoes("after");
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
}

#[test]
fn a_standby_whose_heartbeats_are_lost_waits_and_still_takes_over() {
    a_standby_that_is_not_heard_waits(&[Traffic::HeartbeatsOfB], true);
}

#[test]
fn a_standby_of_which_the_active_gets_nothing_waits_and_protects_again() {
    a_standby_that_is_not_heard_waits(&[Traffic::HeartbeatsOfB, Traffic::AllToA], false);
}
