//! One failover is a demo: a connection that was opened once survives any number of them, and the node that was
//! repaired protects it each time.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::io::ErrorKind;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tests::agent::port;
use tests::client::{clients, hears, says};
use tests::cluster::seed;
use tests::patience::{Over, slowed, wait_at_most, wait_until};
use tests::pulse::Pulse;
use tests::wire::Wire;
use tests::{Agent, Capture, Cluster, Failover, Host, Lab, Typist, VIP, Wiring, on_each_wiring};

/// From the old active's return until all is protected again, with a few flows.
const TO_REPAIR: Duration = Duration::from_secs(20);

/// A standby has all next hops resolved each 20 s.
const BEFORE_IT_IS_WARMED_ANYHOW: Duration = Duration::from_secs(12);

/// Who is heard for the VIP in this many failovers from node a on.
fn alternating(failovers: usize) -> Vec<[u8; 6]> {
    let nodes = [Host::A.mac(), Host::B.mac()];
    nodes.into_iter().cycle().take(failovers + 1).collect()
}

/// Asks everybody all the time who has the VIP (RFC 826), until told to stop: a node that may speak for it does.
fn ask_who_speaks(lab: &Lab, over: &AtomicBool) {
    let wire = Wire::open(lab.client()).unwrap();
    let mut question = [0xff; 42];
    question[6..12].copy_from_slice(&Host::Client.mac());
    question[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    question[22..28].copy_from_slice(&Host::Client.mac());
    question[28..32].copy_from_slice(&Host::Client.address().octets());
    question[38..].copy_from_slice(&VIP.octets());
    while !over.load(Ordering::Relaxed) {
        wire.send(&question).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
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
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| ask_who_speaks(&lab, &over));
        let _over = Over(&over);
        fail_over_again_and_again(&mut cluster, &mut nc, &pulse, ways);
    });
    nc.echoes("typed last");
    assert!(nc.hang_up().success());
    pulse.finish().unwrap();
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    assert_eq!(trace.voices(), alternating(ways.len()));
}

fn fail_over_again_and_again(
    cluster: &mut Cluster<'_>,
    nc: &mut Typist,
    pulse: &Pulse,
    ways: &[Failover],
) {
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
}

fn there_and_back_by_two_kills(wiring: Wiring) {
    two_connections_survive(wiring, &[Failover::Kill9; 2]);
}

/// Behind the cut the active's kernel asks for the client in the name of the VIP, and would go on doing so, in vain,
/// each second: who takes over next would wait for that.
fn whoever_was_cut_off_knows_the_way_to_the_client_before_it_is_needed(wiring: Wiring) {
    let lab = wiring.lab();
    let mut cluster = Cluster::start(&lab, &wiring.settings());
    cluster.active().wait_not_degraded();
    let pulse = Pulse::start(&lab).unwrap();
    cluster.wait_redundant(1, slowed(TO_REPAIR));
    pulse.beat_on(20);
    cluster.fail_over(Failover::LinkCut);
    cluster.wait_redundant(1, slowed(TO_REPAIR));
    let standby = lab.host(cluster.standby().host());
    let client = Host::Client.address();
    wait_at_most(
        BEFORE_IT_IS_WARMED_ANYHOW,
        "the client's hardware address",
        || standby.sh(&format!("ip neigh show {client}")).unwrap(),
        |entry| entry.contains(&Host::Client.mac_text()),
    );
    pulse.finish().unwrap();
}

/// Asked without pause, only one answers: neither who hangs, nor who wakes, nor who was cut off, nor who has handed
/// over.
fn whoever_has_lost_the_vip_does_not_answer_for_it(wiring: Wiring) {
    let ways = [
        Failover::Hang,
        Failover::Switchover,
        Failover::LinkCut,
        Failover::Kill9,
    ];
    two_connections_survive(wiring, &[ways, ways].concat());
}

fn twenty_failovers_of_every_kind(wiring: Wiring) {
    let seed = seed();
    eprintln!("RFSIS_TEST_SEED={seed}");
    two_connections_survive(wiring, &Failover::shuffled(20, seed));
}

const JOINED: [(&str, &str); 1] = [("result", "joined")];
const ADOPTED: [(&str, &str); 1] = [("result", "adopted")];

/// So many that handing them over takes longer than to notice that it has begun.
const MANY: u64 = 1_000;

/// Of those that a second death struck: how many go on. The others were reset, and none waits.
fn survivors(streams: &[TcpStream]) -> u64 {
    let asked = Instant::now();
    let said: Vec<_> = (streams.iter().zip(10_000..))
        .map(|(stream, seed)| (stream, seed, says(stream, seed)))
        .collect();
    let goes_on = |(stream, seed, said): (&TcpStream, u64, anyhow::Result<()>)| match said
        .and_then(|()| hears(stream, seed))
    {
        Ok(()) => true,
        Err(error) => {
            let kind = error.downcast_ref().map(std::io::Error::kind);
            let reset = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
            assert!(kind.is_some_and(|kind| reset.contains(&kind)), "{error:#}");
            false
        }
    };
    let count = said
        .into_iter()
        .map(goes_on)
        .filter(|&goes_on| goes_on)
        .count();
    assert!(asked.elapsed() < slowed(Duration::from_secs(10)));
    count as u64
}

/// Waits until the active says that its standby has got some flows, and not all.
fn some_have_joined(active: &Agent) {
    active.wait_metric("rfsis_late_joins_total", &JOINED, 1.0);
}

/// While the flows are handed over to it, the standby is killed again and again.
fn a_standby_that_dies_while_it_is_given_the_flows_costs_nobody_anything(wiring: Wiring) {
    let lab = wiring.lab();
    let mut cluster = Cluster::start(&lab, &wiring.settings());
    cluster.active().wait_not_degraded();
    let streams = clients(&lab, MANY);
    let capture = Capture::start(&lab);
    let pulse = Pulse::start(&lab).unwrap();
    cluster.wait_redundant(MANY + 1, slowed(TO_REPAIR));
    cluster.kill_active();
    for _ in 0..3 {
        cluster.active().wait_state("active");
        let joined = |agent: &Agent| agent.metrics().sum("rfsis_late_joins_total", &JOINED);
        let before = joined(cluster.active());
        cluster.start_standby();
        wait_until(
            "another late join",
            || joined(cluster.active()),
            |&now| now > before,
        );
        cluster.kill_standby();
        pulse.beat_on(20);
    }
    cluster.start_standby();
    cluster.wait_redundant(MANY + 1, slowed(TO_REPAIR));
    // What all that was for.
    cluster.fail_over(Failover::Kill9);
    assert_eq!(survivors(&streams), MANY);
    pulse.finish().unwrap();
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    assert_eq!(trace.voices(), alternating(2));
}

/// The second death comes too early for some: they are reset, the others go on, and so does the service.
fn a_second_death_too_early(wiring: Wiring, first: Failover, early: fn(&Cluster<'_>)) {
    let lab = wiring.lab();
    let mut cluster = Cluster::start(&lab, &wiring.settings());
    cluster.active().wait_not_degraded();
    let streams = clients(&lab, MANY);
    cluster.wait_redundant(MANY, slowed(TO_REPAIR));
    let capture = Capture::start(&lab);
    cluster.fail_over(first);
    cluster.standby().wait_state("standby");
    early(&cluster);
    cluster.fail_over(Failover::Kill9);
    let alive = survivors(&streams);
    eprintln!("{alive} of {MANY} go on");
    assert!(alive < MANY, "it was not too early for any");
    cluster.wait_redundant(alive, slowed(TO_REPAIR));
    let trace = capture.stop();
    trace.no_byte_from_vip_changed().unwrap();
    // Before the first death nobody has said anything since the capture began.
    assert_eq!(trace.voices(), alternating(2)[1..]);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("anew");
    cluster.wait_redundant(alive + 1, slowed(TO_REPAIR));
    cluster.fail_over(Failover::Kill9);
    nc.echoes("and on");
}

fn an_active_that_dies_while_it_hands_its_flows_over(wiring: Wiring) {
    a_second_death_too_early(wiring, Failover::Kill9, |cluster| {
        some_have_joined(cluster.active());
    });
}

/// The old active only slept, so it is there at once.
fn an_active_that_dies_while_its_kernel_adopts(wiring: Wiring) {
    a_second_death_too_early(wiring, Failover::Hang, |cluster| {
        let adopted = ("rfsis_adoptions_total", &ADOPTED);
        cluster.active().wait_metric(adopted.0, adopted.1, 1.0);
    });
}

/// At any moment of a switchover either node dies. The connections were adopted before, and joined late.
fn whoever_dies_while_adopted_flows_are_handed_over_they_go_on(wiring: Wiring) {
    const FEW: u64 = 50;
    for (dies_active, after) in [(true, 0), (true, 2), (false, 0), (false, 2)] {
        let lab = wiring.lab();
        let mut cluster = Cluster::start(&lab, &wiring.settings());
        cluster.active().wait_not_degraded();
        let streams = clients(&lab, FEW);
        cluster.wait_redundant(FEW, slowed(TO_REPAIR));
        cluster.fail_over(Failover::Kill9);
        cluster.wait_redundant(FEW, slowed(TO_REPAIR));
        assert_eq!(
            cluster
                .active()
                .metrics()
                .sum("rfsis_adoptions_total", &ADOPTED),
            FEW as f64
        );
        let capture = Capture::start(&lab);
        let (dies, lives) = match dies_active {
            true => (cluster.active(), cluster.standby()),
            false => (cluster.standby(), cluster.active()),
        };
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| lives.ask(&["switchover"]));
            // The scenario: any moment of it. The command itself takes some milliseconds to start.
            std::thread::sleep(Duration::from_millis(4 + after));
            dies.kill9();
            asked.join().unwrap();
        });
        lives.wait_state("active");
        // Where the VIP had just moved to the one that died, so had they, and nobody protected them yet.
        let moved = lives.log().contains("gave the VIP up at epoch 3");
        let alive = survivors(&streams);
        eprintln!("{alive} of {FEW} go on, moved before: {moved}");
        assert!(alive == FEW || (moved && !dies_active));
        let trace = capture.stop();
        trace.no_byte_from_vip_changed().unwrap();
        if alive == FEW {
            trace.no_reset_from_vip().unwrap();
        }
    }
}

/// Nobody knows of their connections any more. Their clients must hear it.
fn both_die_and_the_service_comes_back(wiring: Wiring) {
    let lab = wiring.lab();
    let mut cluster = Cluster::start(&lab, &wiring.settings());
    cluster.active().wait_not_degraded();
    let streams = clients(&lab, 20);
    cluster.wait_redundant(20, slowed(TO_REPAIR));
    for _ in 0..2 {
        cluster.restart_both();
    }
    assert_eq!(survivors(&streams), 0);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("anew");
    cluster.wait_redundant(1, slowed(TO_REPAIR));
    cluster.fail_over(Failover::Kill9);
    nc.echoes("and on");
}

on_each_wiring! { [mirror: Mirror, mirror_offloaded: MirrorOffloaded] {
    there_and_back_by_two_kills => super::there_and_back_by_two_kills;
}}

on_each_wiring! { [on_a_switch: Mirror] {
    whoever_has_lost_the_vip_does_not_answer_for_it => super::whoever_has_lost_the_vip_does_not_answer_for_it;
    twenty_failovers_of_every_kind => super::twenty_failovers_of_every_kind;
    a_standby_that_dies_while_it_is_given_the_flows_costs_nobody_anything =>
        super::a_standby_that_dies_while_it_is_given_the_flows_costs_nobody_anything;
    an_active_that_dies_while_it_hands_its_flows_over => super::an_active_that_dies_while_it_hands_its_flows_over;
    an_active_that_dies_while_its_kernel_adopts => super::an_active_that_dies_while_its_kernel_adopts;
    whoever_dies_while_adopted_flows_are_handed_over_they_go_on =>
        super::whoever_dies_while_adopted_flows_are_handed_over_they_go_on;
    whoever_was_cut_off_knows_the_way_to_the_client_before_it_is_needed =>
        super::whoever_was_cut_off_knows_the_way_to_the_client_before_it_is_needed;
    both_die_and_the_service_comes_back => super::both_die_and_the_service_comes_back;
}}
