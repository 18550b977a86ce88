//! Who is active, whatever happens: exactly one in the end.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::time::Duration;

use tests::agent::port;
use tests::faults::{Fault, Traffic};
use tests::patience::wait_until;
use tests::{Agent, Capture, Death, Host, Pair, Typist, VIP, Wiring, on_each_wiring};

fn a_stopped_and_continued_active_ends_with_exactly_one_active(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, Death::Stop);
    // The scenario: a second of standstill, as from a paused virtual machine.
    std::thread::sleep(Duration::from_secs(1));
    pair.primary.cont();
    let active = pair.wait_one_active();
    assert_eq!(active.host(), Host::B, "the higher epoch wins");
    nc.echoes("after");
}

fn two_actives_after_a_partition_become_one_and_the_winner_announces_itself_again(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    // Both have carrier: it is between the switches that nothing gets through.
    lab.suffer(&[Traffic::HeartbeatsOfA, Traffic::HeartbeatsOfB].map(|of| Fault::loses(of, 100)));
    pair.wait_takeover();
    assert_eq!(pair.primary.status().unwrap()["state"], "active");
    let capture = Capture::start(&lab);
    lab.heal();
    assert_eq!(pair.wait_one_active().host(), Host::B);
    let loser = pair.primary.wait_state("standby");
    let winner = pair.backup.status().unwrap();
    assert_eq!(loser["peer"]["epoch"], winner["epoch"]);
    Typist::tcp(&lab, port::ECHO).echoes("to the winner");
    let announcements = capture.stop();
    let announcements = announcements
        .from_vip_by(Host::B.mac())
        .filter_map(|frame| frame.arp())
        .filter(|arp| arp.target == VIP);
    assert!(
        announcements.count() > 0,
        "gratuitous ARP after the link was mended"
    );
}

/// Who works on a standby may pull its cable: nobody notices, and it comes back as what it was.
fn a_standby_whose_cable_is_pulled_stays_standby_and_guards_again_afterwards(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    let before = pair.primary.status().unwrap();
    lab.cut(Host::B);
    pair.primary
        .wait_status("not ready", |status| status["ready"] == false);
    let alone = pair
        .backup
        .wait_status("not ready", |status| status["ready"] == false);
    assert_eq!(alone["state"], "standby", "{alone:#}");
    nc.echoes("in the cut");
    lab.mend(Host::B);
    for (agent, state) in [(&pair.primary, "active"), (&pair.backup, "standby")] {
        let after = agent.wait_status("ready", |status| status["ready"] == true);
        assert_eq!(
            (&after["state"], &after["epoch"]),
            (&state.into(), &before["epoch"])
        );
    }
    nc.echoes("after");
}

/// Plugged in again it hears that there is another, before it says anything.
fn an_active_whose_cable_was_pulled_is_silent_when_it_is_plugged_in_again(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, Death::LinkCut);
    pair.wait_takeover();
    let fenced = pair.primary.wait_state("fenced");
    assert_eq!(fenced["epoch"], 1, "it claims nothing: {fenced:#}");
    let capture = Capture::start(&lab);
    lab.mend(Host::A);
    pair.primary.wait_state("standby");
    nc.echoes("after");
    let trace = capture.stop();
    assert_eq!(trace.from_vip_by(Host::A.mac()).count(), 0);
    trace.no_reset_from_vip().unwrap();
}

/// Both lose their cables at once, and get them again, the standby last: nobody takes over, and all goes on.
fn a_switch_that_is_restarted_moves_nothing(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    let nodes = [(&pair.primary, "active"), (&pair.backup, "standby")];
    let before = nodes.map(|(agent, _)| agent.status().unwrap());
    for (agent, _) in nodes {
        lab.cut(agent.host());
    }
    pair.primary.wait_state("fenced");
    pair.backup
        .wait_status("not ready", |status| status["ready"] == false);
    let capture = Capture::start(&lab);
    for (agent, _) in nodes {
        lab.mend(agent.host());
    }
    for ((agent, state), before) in nodes.iter().zip(&before) {
        let after = agent.wait_status("ready", |status| status["ready"] == true);
        assert_eq!(
            (&after["state"], &after["epoch"]),
            (&(*state).into(), &before["epoch"])
        );
        assert_eq!(after["failovers"], before["failovers"]);
    }
    nc.echoes("after");
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    assert_eq!(trace.voices(), [Host::A.mac()]);
}

/// Nobody else is there to speak for the VIP: who was cut off does so again, and its connections go on.
fn an_active_that_is_alone_goes_on_when_its_cable_is_plugged_in_again(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.kill9();
    lab.cut(Host::A);
    pair.primary.wait_state("fenced");
    let capture = Capture::start(&lab);
    lab.mend(Host::A);
    pair.primary.wait_state("active");
    nc.echoes("after");
    capture.stop().no_reset_from_vip().unwrap();
}

fn a_restarted_primary_becomes_standby_while_the_backup_is_active(wiring: Wiring) {
    let lab = wiring.lab();
    let settings = wiring.settings();
    let mut pair = Pair::start(&lab, &settings);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, Death::Kill9);
    let active = pair.wait_takeover();
    nc.echoes("while the primary is gone");
    pair.primary.await_exit();
    pair.primary = Agent::start(&lab, Host::A, "primary", &settings);
    let restarted = pair
        .primary
        .wait_status("a peer", |status| status["peer"]["state"] == "active");
    assert_eq!(restarted["state"], "standby");
    let backup = pair
        .backup
        .wait_status("its peer", |status| status["peer"]["state"] == "standby");
    assert_eq!(
        (&backup["state"], &backup["epoch"]),
        (&active["state"], &active["epoch"])
    );
    nc.echoes("beside the restarted primary");
}

fn the_restarted_primary_takes_over_when_the_backup_dies_in_its_turn(wiring: Wiring) {
    let lab = wiring.lab();
    let settings = wiring.settings();
    let mut pair = Pair::start(&lab, &settings);
    pair.primary_dies(&lab, Death::Kill9);
    let first = pair.wait_takeover();
    pair.primary.await_exit();
    pair.primary = Agent::start(&lab, Host::A, "primary", &settings);
    pair.primary
        .wait_status("ready", |status| status["ready"] == true);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("with the backup");
    pair.primary.wait_flows("lockstep", 1);
    pair.backup.kill9();
    nc.echoes("with the primary again");
    let second = pair.primary.wait_state("active");
    assert!(second["epoch"].as_u64() > first["epoch"].as_u64());
}

fn a_backup_that_hears_nobody_becomes_active_after_the_startup_grace(wiring: Wiring) {
    let lab = wiring.lab();
    let backup = Agent::start(&lab, Host::B, "backup", &wiring.settings());
    let early = wait_until("its first status", || backup.status(), Option::is_some);
    let active = backup.wait_state("active");
    assert_eq!(active["failovers"], 0, "a start is no failover: {active:#}");
    assert_eq!(
        early.unwrap()["state"],
        "standby",
        "not before the grace of a second"
    );
    assert!(active["uptime_seconds"].as_f64() >= Some(1.0), "{active:#}");
    Typist::tcp(&lab, port::ECHO).echoes("served by the backup");
}

fn a_primary_that_leaves_in_order_is_followed_by_the_backup(wiring: Wiring) {
    let lab = wiring.lab();
    let mut pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    let capture = Capture::start(&lab);
    assert!(pair.primary.terminate().success());
    nc.echoes("after");
    pair.wait_takeover();
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace
        .dead_host_is_silent(Host::A.mac(), Host::B.mac())
        .unwrap();
}

fn a_standby_that_dies_disturbs_nobody(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.kill9();
    let alone = pair
        .primary
        .wait_status("not ready", |status| status["ready"] == false);
    assert_eq!(
        (&alone["state"], &alone["failovers"]),
        (&"active".into(), &0.into())
    );
    nc.echoes("after");
}

on_each_wiring! { [on_a_lan: Lan, on_a_switch: Mirror] {
    a_stopped_and_continued_active_ends_with_exactly_one_active => super::a_stopped_and_continued_active_ends_with_exactly_one_active;
    two_actives_after_a_partition_become_one_and_the_winner_announces_itself_again => super::two_actives_after_a_partition_become_one_and_the_winner_announces_itself_again;
    a_standby_whose_cable_is_pulled_stays_standby_and_guards_again_afterwards => super::a_standby_whose_cable_is_pulled_stays_standby_and_guards_again_afterwards;
    an_active_whose_cable_was_pulled_is_silent_when_it_is_plugged_in_again => super::an_active_whose_cable_was_pulled_is_silent_when_it_is_plugged_in_again;
    a_switch_that_is_restarted_moves_nothing => super::a_switch_that_is_restarted_moves_nothing;
    an_active_that_is_alone_goes_on_when_its_cable_is_plugged_in_again => super::an_active_that_is_alone_goes_on_when_its_cable_is_plugged_in_again;
    a_restarted_primary_becomes_standby_while_the_backup_is_active => super::a_restarted_primary_becomes_standby_while_the_backup_is_active;
    the_restarted_primary_takes_over_when_the_backup_dies_in_its_turn => super::the_restarted_primary_takes_over_when_the_backup_dies_in_its_turn;
    a_backup_that_hears_nobody_becomes_active_after_the_startup_grace => super::a_backup_that_hears_nobody_becomes_active_after_the_startup_grace;
    a_primary_that_leaves_in_order_is_followed_by_the_backup => super::a_primary_that_leaves_in_order_is_followed_by_the_backup;
    a_standby_that_dies_disturbs_nobody => super::a_standby_that_dies_disturbs_nobody;
}}
