//! The planned handover: nothing is lost, nobody waits for a deadline, and what would be lost is named.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::io::{ErrorKind, Write as _};
use std::net::Shutdown;
use std::process::Output;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tests::agent::port;
use tests::client::{chargen_exactly, connect, echo_exactly, hears, parts, says, tcp_sockets};
use tests::patience::wait_until;
use tests::pulse::Pulse;
use tests::{
    Agent, Capture, Death, Host, Lab, LabOptions, Pair, Settings, Typist, Wiring, on_each_wiring,
};

/// What only a client's timeout repairs takes longer.
const SHORT_OF_A_TIMEOUT: Duration = Duration::from_millis(200);

fn switchover(agent: &Agent, arguments: &[&str]) -> Output {
    agent.ask(&[&["switchover"], arguments].concat())
}

#[track_caller]
fn switches(agent: &Agent, arguments: &[&str]) {
    let output = switchover(agent, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
}

/// Exit code 1, and a reason that has these words.
#[track_caller]
fn refuses(agent: &Agent, arguments: &[&str], reason: &str) {
    let output = switchover(agent, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains(reason), "{errors}");
}

#[track_caller]
fn state(agent: &Agent) -> String {
    let status = agent.status().unwrap();
    status["state"].as_str().unwrap().to_owned()
}

/// A standby that sees the connections of the active: nothing else speaks against a switchover.
fn pair(wiring: Wiring, lab: &Lab) -> Pair {
    Pair::start(lab, &wiring.settings())
}

fn an_echo_at_1_khz_goes_on_without_a_timeout(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = pair(wiring, &lab);
    let capture = Capture::start(&lab);
    let pulse = Pulse::start(&lab).unwrap();
    pulse.beat_on(200);
    pair.backup.wait_flows("lockstep", 1);
    switches(&pair.primary, &[]);
    assert_eq!(state(&pair.backup), "active");
    assert_eq!(state(&pair.primary), "standby");
    pulse.beat_on(200);
    let seen = pulse.finish().unwrap();
    assert!(seen.longest < SHORT_OF_A_TIMEOUT, "{seen:?}");
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    trace
        .dead_host_is_silent(Host::A.mac(), Host::B.mac())
        .unwrap();
    let status = pair.backup.status().unwrap();
    assert_eq!(status["history"][0]["reason"], "switchover", "{status}");
    let failovers = [("reason", "switchover")];
    pair.backup
        .wait_metric("rfsis_failovers_total", &failovers, 1.0);
}

fn asked_of_the_standby_it_is_the_same(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = pair(wiring, &lab);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    switches(&pair.backup, &[]);
    assert_eq!(state(&pair.backup), "active");
    pair.primary.wait_state("standby");
    nc.echoes("after");
    assert!(nc.hang_up().success());
}

fn sigterm_of_the_active_hands_over(wiring: Wiring) {
    let lab = wiring.lab();
    let mut pair = pair(wiring, &lab);
    let pulse = Pulse::start(&lab).unwrap();
    pulse.beat_on(200);
    pair.backup.wait_flows("lockstep", 1);
    assert!(pair.primary.terminate().success());
    assert_eq!(state(&pair.backup), "active");
    pulse.beat_on(200);
    let seen = pulse.finish().unwrap();
    assert!(seen.longest < SHORT_OF_A_TIMEOUT, "{seen:?}");
    let status = pair.backup.status().unwrap();
    assert_eq!(status["last_failover"]["reason"], "switchover", "{status}");
}

/// So much at once that no queue of the LAN overflows. Where no ACK gate waits for the standby, a copy that is dropped
/// is one that it never gets: the flow is called unprotected, and the switchover refused.
const NARROW: [(&str, &str); 2] = [
    ("ipv4/tcp_rmem", "4096 32768 65536"),
    ("ipv4/tcp_wmem", "4096 32768 65536"),
];

fn transfers_in_both_directions_go_on_byte_exact(wiring: Wiring) {
    let narrow = match wiring.settings().sync {
        true => Vec::new(),
        false => NARROW.into(),
    };
    let lab = wiring.lab_with(LabOptions {
        client_sysctls: narrow,
        ..LabOptions::default()
    });
    let pair = pair(wiring, &lab);
    let [echo, chargen, discard] =
        [port::ECHO, port::CHARGEN, port::DISCARD].map(|port| connect(&lab, port).unwrap());
    let [echoed, read, written] = [(); 3].map(|()| AtomicU64::new(0));
    const TOTAL: u64 = 48 << 20;
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| echo_exactly(&echo, TOTAL, 7, &echoed));
        let chargen = scope.spawn(|| chargen_exactly(&chargen, 0, TOTAL, &read));
        let discard = scope.spawn(|| {
            let (mut discard, chunk) = (&discard, vec![7; 16 * 1024]);
            while written.fetch_add(chunk.len() as u64, Ordering::Relaxed) < TOTAL {
                discard.write_all(&chunk)?;
            }
            parts(discard)
        });
        let moved = [&echoed, &read, &written];
        let all = || moved.map(|count| count.load(Ordering::Relaxed));
        wait_until("all three under way", all, |all| {
            all.iter().all(|count| *count > TOTAL / 16)
        });
        switches(&pair.primary, &[]);
        let at = all();
        echo.join().unwrap().unwrap();
        chargen.join().unwrap().unwrap();
        discard.join().unwrap().unwrap();
        assert!(
            at.iter().any(|count| *count < TOTAL),
            "all were over: {at:?}"
        );
    });
}

/// A SYN that is lost is repeated after a second. None is, whenever it comes.
fn connections_that_open_meanwhile_wait_for_no_timeout(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = pair(wiring, &lab);
    let over = AtomicU64::new(0);
    let longest = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let (lab, over) = (&lab, &over);
                scope.spawn(move || {
                    let (mut longest, mut number) = (Duration::ZERO, client << 32);
                    while over.load(Ordering::Relaxed) == 0 {
                        let began = std::time::Instant::now();
                        let stream = connect(lab, port::ECHO)?;
                        says(&stream, number)?;
                        hears(&stream, number)?;
                        longest = longest.max(began.elapsed());
                        parts(&stream)?;
                        number += 1;
                    }
                    anyhow::Ok(longest)
                })
            })
            .collect();
        pair.primary
            .wait_metric("rfsis_connections_total", &[], 40.0);
        switches(&pair.primary, &["--force"]);
        pair.backup
            .wait_metric("rfsis_connections_total", &[], 40.0);
        over.store(1, Ordering::Relaxed);
        let longest = clients.into_iter().map(|c| c.join().unwrap().unwrap());
        longest.max().unwrap()
    });
    assert!(longest < Duration::from_millis(900), "{longest:?}");
}

fn without_a_standby_it_is_refused_and_the_active_ends_all_the_same(wiring: Wiring) {
    let lab = wiring.lab();
    let mut pair = pair(wiring, &lab);
    refuses_when_alone(&mut pair);
    assert!(pair.primary.terminate().success());
}

#[track_caller]
fn refuses_when_alone(pair: &mut Pair) {
    pair.backup.kill9();
    pair.backup.await_exit();
    // The peer's last word may still count for the takeover time.
    let log = || pair.primary.log();
    wait_until("a peer that is down", log, |log| log.contains("is down"));
    for force in [&[][..], &["--force"]] {
        refuses(&pair.primary, force, "no standby is heard");
    }
    assert_eq!(state(&pair.primary), "active");
}

fn flows_at_risk_are_named_and_only_force_gives_them_up(wiring: Wiring) {
    const PIECE: u64 = 100_000;
    let lab = wiring.lab();
    let pair = pair(wiring, &lab);
    let half_closed = connect(&lab, port::CHARGEN).unwrap();
    half_closed.shutdown(Shutdown::Write).unwrap();
    let reads = |from| chargen_exactly(&half_closed, from, PIECE, &AtomicU64::new(0)).unwrap();
    reads(0);
    pair.backup.wait_flows("lockstep", 1);
    switches(&pair.primary, &[]);
    reads(PIECE);
    // It stays on its shadow, and the old active does not follow it.
    pair.backup.wait_flows("live", 1);
    // Else that is the reason.
    pair.backup.wait_not_degraded();
    for asked in [&pair.primary, &pair.backup] {
        refuses(asked, &[], "1 flow is unprotected");
        let (code, why) = pair.backup.http("/ready").unwrap();
        assert_eq!(code, 503, "{why}");
    }
    let status = pair
        .primary
        .wait_status("not ready", |status| status["ready"] == false);
    assert_eq!(status["at_risk"], 1, "{status}");
    assert!(status["redundant_since"].is_null(), "{status}");
    reads(2 * PIECE);
    switches(&pair.primary, &["--force"]);
    assert_eq!(state(&pair.primary), "active");
    // Reset at once, or when it speaks, by what the new active knows of it.
    let ended = std::io::copy(&mut &half_closed, &mut std::io::sink());
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::ConnectionReset);
    for agent in [&pair.primary, &pair.backup] {
        agent.wait_status("redundant again", |status| {
            status["ready"] == true && status["redundant_since"].is_string()
        });
    }
}

fn it_goes_back_and_forth_as_often_as_one_likes(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = pair(wiring, &lab);
    for round in 1..=6 {
        let mut nc = Typist::tcp(&lab, port::ECHO);
        nc.echoes("before");
        let (active, standby) = if round % 2 == 1 {
            (&pair.primary, &pair.backup)
        } else {
            (&pair.backup, &pair.primary)
        };
        standby.wait_flows("lockstep", 1);
        // Until the flow of the round before is known to be over.
        let asked = if round % 3 == 0 { standby } else { active };
        wait_until(
            "a switchover without loss",
            || switchover(asked, &[]),
            |output| output.status.success(),
        );
        nc.echoes("after");
        assert!(nc.hang_up().success());
        let status = standby.wait_status("rid of the flow", |status| {
            status["flows"]["live"] == 0 && status["ready"] == true
        });
        assert_eq!(status["epoch"], round + 1, "a claim in between");
        active.wait_status("ready", |status| status["ready"] == true);
    }
}

fn whoever_dies_in_the_middle_the_other_serves(wiring: Wiring) {
    for victim in [Host::A, Host::B] {
        for after in [0, 1, 2, 4] {
            let lab = wiring.lab();
            let pair = pair(wiring, &lab);
            let mut nc = Typist::tcp(&lab, port::ECHO);
            nc.echoes("before");
            pair.backup.wait_flows("lockstep", 1);
            let (dies, lives) = match victim {
                Host::A => (&pair.primary, &pair.backup),
                _ => (&pair.backup, &pair.primary),
            };
            std::thread::scope(|scope| {
                let asked = scope.spawn(|| switchover(lives, &[]));
                // The scenario: any moment of it. The command itself takes some milliseconds to start.
                std::thread::sleep(Duration::from_millis(4 + after));
                dies.kill9();
                asked.join().unwrap();
            });
            lives.wait_state("active");
            // Where the VIP had already moved to the victim, so had the flow.
            if lives.log().contains("gave the VIP up") {
                Typist::tcp(&lab, port::ECHO).echoes("anew");
            } else {
                nc.echoes("after");
            }
        }
    }
}

/// It was heard a moment ago, so it is offered the VIP; nothing is lost by that but time.
fn a_standby_that_hangs_does_not_take_the_vip_then_or_later(wiring: Wiring) {
    let lab = wiring.lab();
    let settings = Settings {
        interval: "200ms".into(),
        missed: 5,
        ..wiring.settings()
    };
    let pair = Pair::start(&lab, &settings);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    let epoch = pair.primary.status().unwrap()["epoch"].clone();
    pair.backup.stop();
    refuses(&pair.primary, &["--force"], "did not take the VIP over");
    nc.echoes("goes on");
    pair.backup.cont();
    // It finds the offer in its ring, and that it was taken back behind it.
    pair.backup
        .wait_status("awake", |status| status["peer"]["state"] == "active");
    nc.echoes("and on");
    let status = pair.primary.status().unwrap();
    assert_eq!(
        (&status["state"], &status["epoch"]),
        (&"active".into(), &epoch)
    );
    assert_eq!(state(&pair.backup), "standby");
}

/// The backup's agent dies and is started anew, while the connections go on.
fn restart_backup(lab: &Lab, pair: &mut Pair, settings: &Settings, connections: &mut [Typist]) {
    pair.backup.kill9();
    pair.backup.await_exit();
    for nc in &mut *connections {
        nc.echoes("while it is gone");
    }
    pair.backup = Agent::start(lab, Host::B, "backup", settings);
    pair.backup
        .wait_status("back", |status| status["peer"]["state"] == "active");
    for nc in connections {
        nc.echoes("it is back");
    }
}

fn a_restarted_standby_costs_nothing_and_is_ready_when_it_has_every_flow(wiring: Wiring) {
    let lab = wiring.lab();
    let settings = wiring.settings();
    let mut pair = Pair::start(&lab, &settings);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    restart_backup(&lab, &mut pair, &settings, std::slice::from_mut(&mut nc));
    for agent in [&pair.primary, &pair.backup] {
        // Ready may be the word of a moment ago.
        let status = agent.wait_status("ready with all flows", |status| {
            status["ready"] == true && status["at_risk"] == 0
        });
        assert!(status["last_failover"].is_null(), "{status}");
    }
    pair.backup.wait_flows("lockstep", 1);
    switches(&pair.backup, &[]);
    nc.echoes("on the backup");
    assert!(nc.hang_up().success());
}

fn a_flow_that_the_restarted_standby_cannot_take_is_at_risk_until_it_ends(wiring: Wiring) {
    let lab = wiring.lab();
    let settings = wiring.settings();
    let mut pair = Pair::start(&lab, &settings);
    let mut connections = [(); 2].map(|()| Typist::tcp(&lab, port::ECHO));
    for nc in &mut connections {
        nc.echoes("before");
    }
    pair.backup.wait_flows("lockstep", 2);
    let room_for_one = Settings {
        max_flows: Some(1),
        ..settings
    };
    restart_backup(&lab, &mut pair, &room_for_one, &mut connections);
    for agent in [&pair.primary, &pair.backup] {
        let status = agent.wait_status("a flow at risk", |status| status["at_risk"] == 1);
        agent.wait_status("not ready", |status| status["ready"] == false);
        assert!(status["last_failover"].is_null(), "{status}");
    }
    refuses(&pair.backup, &[], "1 flow is unprotected");
    for mut nc in connections {
        assert!(nc.hang_up().success());
    }
    for agent in [&pair.primary, &pair.backup] {
        agent.wait_status("ready", |status| status["ready"] == true);
    }
}

/// The host lives and its agent is killed: the kernel goes on closing what that had open, forever silent.
fn what_a_killed_active_left_open_is_destroyed_and_never_speaks_again(wiring: Wiring) {
    let lab = wiring.lab();
    let settings = wiring.settings();
    let mut pair = Pair::start(&lab, &settings);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, Death::Kill9);
    pair.primary.await_exit();
    pair.wait_takeover();
    nc.echoes("on the backup");
    let left = || tcp_sockets(lab.host(Host::A), Host::Client.address());
    assert_eq!(left().len(), 1, "{:?}", left());
    pair.primary = Agent::start(&lab, Host::A, "primary", &settings);
    wait_until("no stale socket", left, Vec::is_empty);
    pair.backup
        .wait_status("a standby", |status| status["peer"]["state"] == "standby");
    let capture = Capture::start(&lab);
    switches(&pair.backup, &["--force"]);
    let mut second = Typist::tcp(&lab, port::ECHO);
    second.echoes("on the primary again");
    let trace = capture.stop();
    let by_primary = trace.from_vip_by(Host::A.mac());
    let mut of_service = by_primary.filter_map(|frame| frame.tcp());
    assert!(of_service.all(|segment| !segment.fin), "a stale FIN");
}

fn a_primary_that_preempts_gets_the_vip_back_without_loss(wiring: Wiring) {
    let lab = wiring.lab();
    let settings = Settings {
        preempt: Some("1s".into()),
        ..wiring.settings()
    };
    let mut pair = Pair::start(&lab, &settings);
    pair.primary_dies(&lab, Death::Kill9);
    pair.primary.await_exit();
    pair.wait_takeover();
    pair.primary = Agent::start(&lab, Host::A, "primary", &settings);
    pair.primary
        .wait_status("ready", |status| status["ready"] == true);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("on the backup");
    let status = pair.primary.wait_failover();
    assert_eq!(status["last_failover"]["reason"], "switchover", "{status}");
    nc.echoes("on the primary");
    pair.backup.wait_state("standby");
}

on_each_wiring!([lan: Lan, mirror_async: MirrorAsync, mirror: Mirror, mirror_offloaded: MirrorOffloaded, mirror_over_sync_link: MirrorOverSyncLink] {
    echo_at_1_khz => an_echo_at_1_khz_goes_on_without_a_timeout;
    transfers => transfers_in_both_directions_go_on_byte_exact;
    opening => connections_that_open_meanwhile_wait_for_no_timeout;
});

on_each_wiring!([planned_lan: Lan, planned_mirror: Mirror] {
    asked_of_the_standby => asked_of_the_standby_it_is_the_same;
    sigterm => sigterm_of_the_active_hands_over;
    alone => without_a_standby_it_is_refused_and_the_active_ends_all_the_same;
    at_risk => flows_at_risk_are_named_and_only_force_gives_them_up;
    back_and_forth => it_goes_back_and_forth_as_often_as_one_likes;
    kill => whoever_dies_in_the_middle_the_other_serves;
    hang => a_standby_that_hangs_does_not_take_the_vip_then_or_later;
    stale => what_a_killed_active_left_open_is_destroyed_and_never_speaks_again;
    preempt => a_primary_that_preempts_gets_the_vip_back_without_loss;
});

on_each_wiring!([guarded: Mirror] {
    restart => a_restarted_standby_costs_nothing_and_is_ready_when_it_has_every_flow;
    no_room => a_flow_that_the_restarted_standby_cannot_take_is_at_risk_until_it_ends;
});
