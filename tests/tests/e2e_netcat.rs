//! Somebody types into `nc` while the primary dies.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use tests::agent::port;
use tests::{Capture, Death, Host, Pair, Trace, Typist, VIP, Wiring, on_each_wiring};

/// What must hold of the wire whenever node a has died.
#[track_caller]
fn assert_clean_handover(trace: &Trace) {
    let checks = [
        trace.no_reset_from_vip(),
        trace.no_byte_from_vip_changed(),
        trace.dead_host_is_silent(Host::A.mac(), Host::B.mac()),
    ];
    for check in checks {
        check.unwrap();
    }
}

fn tcp_echo_survives(wiring: Wiring, death: Death) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let capture = Capture::start(&lab);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("typed before");
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, death);
    nc.echoes("typed while nobody answers");
    pair.wait_takeover();
    nc.echoes("typed afterwards");
    assert!(nc.is_connected());
    assert!(nc.hang_up().success());
    assert_clean_handover(&capture.stop());
}

fn udp_echo_goes_on(wiring: Wiring, death: Death) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let capture = Capture::start(&lab);
    let mut nc = Typist::udp(&lab, port::ECHO);
    nc.echoes_in_the_end("typed before");
    pair.primary_dies(&lab, death);
    // While nobody answers, nobody may say "port unreachable" either: nc would end.
    nc.echoes_in_the_end("typed afterwards");
    pair.wait_takeover();
    assert_clean_handover(&capture.stop());
}

on_each_wiring! { [lan: Lan, mirror: Mirror] {
    echo_survives_kill_of_the_primary => |wiring| tcp_echo_survives(wiring, Death::Kill9);
    echo_survives_sigstop_of_the_primary => |wiring| tcp_echo_survives(wiring, Death::Stop);
    echo_survives_link_cut_of_the_primary => |wiring| tcp_echo_survives(wiring, Death::LinkCut);
    udp_echo_goes_on_after_kill_of_the_primary => |wiring| udp_echo_goes_on(wiring, Death::Kill9);
    udp_echo_goes_on_after_sigstop_of_the_primary => |wiring| udp_echo_goes_on(wiring, Death::Stop);
    udp_echo_goes_on_after_link_cut_of_the_primary => |wiring| udp_echo_goes_on(wiring, Death::LinkCut);
}}

on_each_wiring! { [mirror_offloaded: MirrorOffloaded, mirror_over_a_sync_link: MirrorOverSyncLink] {
    echo_survives_kill_of_the_primary => |wiring| tcp_echo_survives(wiring, Death::Kill9);
}}

fn new_connections_after_the_takeover_go_to_the_survivor(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    Typist::tcp(&lab, port::ECHO).echoes("to the primary");
    pair.primary_dies(&lab, Death::LinkCut);
    pair.wait_takeover();
    let capture = Capture::start(&lab);
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("to the survivor");
    assert!(nc.hang_up().success());
    let trace = capture.stop();
    assert!(trace.from_vip_by(Host::B.mac()).count() > 0);
    assert_eq!(trace.from_vip_by(Host::A.mac()).count(), 0);
}

fn the_clients_arp_cache_follows_the_virtual_ip(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let neighbour = || lab.client().sh(&format!("ip neigh show {VIP}")).unwrap();
    Typist::tcp(&lab, port::ECHO).echoes("resolve");
    assert!(neighbour().contains(&Host::A.mac_text()), "{}", neighbour());
    pair.primary_dies(&lab, Death::Kill9);
    // The client says nothing meanwhile: the announcement alone must do it.
    tests::patience::wait_until("the survivor's MAC", neighbour, |entry| {
        entry.contains(&Host::B.mac_text())
    });
}

fn status_and_metrics_tell_the_story_of_a_takeover(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("before");
    let before = pair.backup.wait_flows("lockstep", 1);
    assert_eq!(before["peer"]["state"], "active");
    assert_eq!(before["failovers"], 0);
    assert_eq!(before["node"], Host::B.address().to_string());
    assert_eq!(before["role"], "backup");
    assert_eq!(
        before["virtual_ip"]
            .as_str()
            .map(|vip| vip.starts_with("192.168.1.100")),
        Some(true)
    );
    let scrape = pair.backup.metrics();
    assert_eq!(scrape.sum("rfsis_state", &[("state", "standby")]), 1.0);
    assert_eq!(scrape.sum("rfsis_flows", &[("condition", "lockstep")]), 1.0);
    assert!(scrape.sum("rfsis_xdp_packets_total", &[("verdict", "mirrored")]) > 0.0);
    assert!(scrape.has("rfsis_build_info") && scrape.has("rfsis_heartbeat_age_seconds"));

    pair.primary_dies(&lab, Death::Kill9);
    nc.echoes("after");
    let after = pair.backup.wait_failover();
    assert_eq!(after["failovers"], 1);
    assert!(
        after["epoch"].as_u64() > before["epoch"].as_u64(),
        "{after:#}"
    );
    assert_eq!(after["last_failover"]["reason"], "heartbeat_timeout");
    assert_eq!(after["last_failover"]["epoch"], after["epoch"]);
    assert!(
        after["last_failover"]["duration_seconds"]
            .as_f64()
            .is_some_and(|s| s > 0.0 && s < 10.0)
    );
    let adopted = [("result", "adopted")];
    pair.backup
        .wait_metric("rfsis_adoptions_total", &adopted, 1.0);
    pair.backup.wait_flows("unprotected", 1);

    let scrape = pair.backup.metrics();
    assert_eq!(scrape.sum("rfsis_state", &[("state", "active")]), 1.0);
    assert_eq!(scrape.sum("rfsis_state", &[("state", "standby")]), 0.0);
    assert_eq!(
        Some(scrape.sum("rfsis_epoch", &[])),
        after["epoch"].as_f64()
    );
    let timeouts = [("reason", "heartbeat_timeout")];
    assert_eq!(scrape.sum("rfsis_failovers_total", &timeouts), 1.0);
    assert_eq!(
        scrape.sum("rfsis_takeover_duration_seconds_count", &[]),
        1.0
    );
    assert_eq!(scrape.sum("rfsis_flows", &[("condition", "live")]), 0.0);
    assert!(scrape.sum("rfsis_gate_packets_total", &[("verdict", "passed")]) > 0.0);
    assert_eq!(scrape.sum("rfsis_ring_dropped_total", &[]), 0.0);
    assert_eq!(scrape.sum("rfsis_flow_resets_total", &[]), 0.0);
    let text = pair.backup.ask(&["status"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("active") && text.contains("heartbeat_timeout"),
        "{text}"
    );
}

fn ready_means_that_the_peer_is_heard_and_live_does_not(wiring: Wiring) {
    let lab = wiring.lab();
    let alone = tests::Agent::start(&lab, Host::A, "primary", &wiring.settings());
    alone.wait_state("active");
    assert_eq!(alone.http("/live").unwrap().0, 200);
    assert_eq!(alone.http("/ready").unwrap().0, 503);
    let _second = tests::Agent::start(&lab, Host::B, "backup", &wiring.settings());
    alone.wait_status("ready", |status| status["ready"] == true);
    assert_eq!(alone.http("/ready").unwrap().0, 200);
}

/// Who restarts one node after the other must not go on while a death would cost data.
#[test]
fn an_active_node_whose_standby_confirms_nothing_serves_and_is_not_ready() {
    let wiring = Wiring::Mirror;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut nc = Typist::tcp(&lab, port::ECHO);
    nc.echoes("protected");
    let mode =
        |mode: &'static str| move |status: &serde_json::Value| status["protection"]["mode"] == mode;
    pair.primary.wait_status("sync", mode("sync"));
    pair.primary.wait_status("a guarded flow", |status| {
        status["protection"]["guarded"] == 1
    });
    assert_eq!(pair.primary.http("/ready").unwrap().0, 200);
    assert!(mode("standby")(&pair.backup.status().unwrap()));

    // Heartbeats and copies come through.
    let standby = lab.host(Host::B);
    for rule in [
        "table ip deaf",
        "chain ip deaf in { type filter hook input priority 0 ; }",
        "rule ip deaf in udp dport 9501 drop",
    ] {
        standby.sh(&format!("nft add {rule}")).unwrap();
    }
    pair.primary.wait_status("degraded", mode("degraded"));
    pair.primary.wait_status("an exposed flow", |status| {
        status["protection"]["exposed"] == 1 && status["protection"]["guarded"] == 0
    });
    nc.echoes("served all the same");
    pair.primary
        .wait_status("not ready", |status| status["ready"] == false);
    let (code, why) = pair.primary.http("/ready").unwrap();
    assert_eq!(code, 503);
    assert!(why.contains("not protected"), "{why}");
    // It hears of that.
    pair.backup
        .wait_status("not ready", |status| status["ready"] == false);

    standby.sh("nft delete table ip deaf").unwrap();
    pair.primary
        .wait_status("ready", |status| status["ready"] == true);
    pair.primary
        .wait_status("the flow guarded again", |status| {
            status["protection"]["guarded"] == 1 && status["protection"]["exposed"] == 0
        });
    nc.echoes("protected again");
}

on_each_wiring! { [on_a_lan: Lan, on_a_switch: Mirror] {
    new_connections_after_the_takeover_go_to_the_survivor => super::new_connections_after_the_takeover_go_to_the_survivor;
    the_clients_arp_cache_follows_the_virtual_ip => super::the_clients_arp_cache_follows_the_virtual_ip;
    status_and_metrics_tell_the_story_of_a_takeover => super::status_and_metrics_tell_the_story_of_a_takeover;
    ready_means_that_the_peer_is_heard_and_live_does_not => super::ready_means_that_the_peer_is_heard_and_live_does_not;
}}
