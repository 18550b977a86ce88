//! Two hundred connections in every state while the primary dies.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};

use tests::agent::port;
use tests::client::{
    begin_connect, chargen_exactly, connect, echo_exactly, expect_end, tcp_sockets, tcp_state,
};
use tests::patience::wait_until;
use tests::{Capture, Death, Host, Lab, LabOptions, Pair, Typist, VIP, Wiring, on_each_wiring};

const IDLE: usize = 40;
const TRANSFERS: usize = 60;
const HALF_CLOSED_BY_CLIENT: usize = 40;
const HALF_CLOSED_BY_SERVER: usize = 40;
/// The server's half of the handshake has come; the client's final ACK has not.
const ANSWERED: usize = 10;
/// The client's SYN meets nobody.
const UNANSWERED: usize = 10;

/// Bytes of each transfer.
const TRANSFER: u64 = 2 << 20;
/// A standby that shares its CPUs with all the others must keep up: without an ACK gate what it loses is lost.
const CLIENT_RATE: &str = "500mbit";
/// Bytes read of chargen before and after the kill.
const GENERATED: u64 = 256 << 10;

fn connections(lab: &Lab, count: usize, port: u16) -> Vec<TcpStream> {
    (0..count).map(|_| connect(lab, port).unwrap()).collect()
}

/// The client drops SYN-ACKs that arrive while `body` runs.
fn without_syn_acks<T>(lab: &Lab, body: impl FnOnce() -> T) -> T {
    let client = lab.client();
    client.sh("nft add table ip deaf").unwrap();
    client
        .sh("nft add chain ip deaf in { type filter hook input priority 0 ; }")
        .unwrap();
    client
        .sh("nft add rule ip deaf in tcp flags == syn|ack drop")
        .unwrap();
    let result = body();
    client.sh("nft delete table ip deaf").unwrap();
    result
}

on_each_wiring! { [lan: Lan, mirror: Mirror] {
    two_hundred_connections_in_all_states_survive_a_kill => two_hundred_connections_survive;
}}

fn two_hundred_connections_survive(wiring: Wiring) {
    let lab = wiring.lab_with(LabOptions {
        client_rate: Some(CLIENT_RATE),
        ..LabOptions::default()
    });
    let pair = Pair::start(&lab, &wiring.settings());
    let capture = Capture::start(&lab);

    let idle = connections(&lab, IDLE, port::ECHO);
    let by_client = connections(&lab, HALF_CLOSED_BY_CLIENT, port::CHARGEN);
    for stream in &by_client {
        stream.shutdown(Shutdown::Write).unwrap();
        chargen_exactly(stream, 0, GENERATED, &AtomicU64::new(0)).unwrap();
    }
    let by_server = connections(&lab, HALF_CLOSED_BY_SERVER, port::DAYTIME);
    for mut stream in &by_server {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("\r\n"), "{text:?}");
    }
    let transfers = connections(&lab, TRANSFERS, port::ECHO);
    let progress: Vec<AtomicU64> = transfers.iter().map(|_| AtomicU64::new(0)).collect();

    std::thread::scope(|scope| {
        let (answered, running) = without_syn_acks(&lab, || {
            let answered: Vec<_> = (0..ANSWERED)
                .map(|_| begin_connect(&lab, port::ECHO).unwrap())
                .collect();
            pair.backup.wait_flows("handshake", ANSWERED as u64);
            let running: Vec<_> = transfers
                .iter()
                .zip(&progress)
                .zip(10..)
                .map(|((stream, progress), seed)| {
                    scope.spawn(move || echo_exactly(stream, TRANSFER, seed, progress))
                })
                .collect();
            let done = || {
                progress
                    .iter()
                    .map(|bytes| bytes.load(Ordering::Relaxed))
                    .sum()
            };
            wait_until("the transfers to be under way", done, |&bytes: &u64| {
                bytes > TRANSFERS as u64 * TRANSFER / 8
            });
            pair.primary_dies(&lab, Death::Kill9);
            (answered, running)
        });
        let unfinished = progress
            .iter()
            .filter(|bytes| bytes.load(Ordering::Relaxed) < TRANSFER);
        assert!(
            unfinished.count() >= TRANSFERS / 2,
            "they were in the middle of it"
        );
        let unanswered: Vec<_> = (0..UNANSWERED)
            .map(|_| begin_connect(&lab, port::ECHO).unwrap())
            .collect();

        for (connecting, seed) in answered.into_iter().chain(unanswered).zip(1_000..) {
            let stream = connecting.finish().unwrap();
            echo_exactly(&stream, 10_000, seed, &AtomicU64::new(0)).unwrap();
        }
        for transfer in running {
            transfer.join().unwrap().unwrap();
        }
    });
    for (stream, seed) in idle.iter().zip(2_000..) {
        echo_exactly(stream, 10_000, seed, &AtomicU64::new(0)).unwrap();
    }
    for stream in &by_client {
        chargen_exactly(stream, GENERATED, GENERATED, &AtomicU64::new(0)).unwrap();
    }
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
    trace
        .dead_host_is_silent(Host::A.mac(), Host::B.mac())
        .unwrap();

    for stream in &by_server {
        expect_end(stream).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert!(stream.take_error().unwrap().is_none(), "not reset");
    }
    // Each FIN of the client's must be acknowledged by somebody who knows the connection.
    wait_until(
        "the half-closed connections to end",
        || {
            let sockets = tcp_sockets(lab.client(), VIP).into_iter();
            sockets
                .filter(|(_, state)| *state == tcp_state::LAST_ACK)
                .count()
        },
        |&waiting| waiting == 0,
    );
    pair.wait_takeover();
}

fn a_connection_that_ends_after_the_takeover_ends_properly(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let mut stream = connect(&lab, port::ECHO).unwrap();
    stream.write_all(b"before").unwrap();
    let mut back = [0; 6];
    stream.read_exact(&mut back).unwrap();
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    echo_exactly(&stream, 1000, 3, &AtomicU64::new(0)).unwrap();
    // Nothing is left of it on the survivor either.
    pair.backup.wait_flows("live", 0);
}

/// Its SYN-ACK is held like any other until the agent finds that there is no room, and lets it go.
#[test]
fn a_connection_beyond_the_bound_of_flows_opens_without_protection() {
    let wiring = Wiring::Mirror;
    let lab = wiring.lab();
    let config = lab.directory().join("one-flow.yaml");
    let yaml = wiring.settings().yaml() + "shadow: { max_flows: 1 }\n";
    std::fs::write(&config, yaml).unwrap();
    let pair = Pair::start_with(&lab, &config).unwrap();
    let mut first = Typist::tcp(&lab, port::ECHO);
    first.echoes("protected");
    let mut second = Typist::tcp(&lab, port::ECHO);
    second.echoes("not protected");
    first.echoes("still protected");
    let active = &pair.primary;
    active.wait_metric("rfsis_guard_refused_total", &[], 1.0);
    let status = active.wait_status("a guarded flow", |status| {
        status["protection"]["guarded"] == 1
    });
    assert_eq!(status["protection"]["opening"], 0);
    let released = [("verdict", "released")];
    active.wait_metric("rfsis_ack_gate_packets_total", &released, 2.0);
}

on_each_wiring! { [on_a_lan: Lan, on_a_switch: Mirror] {
    a_connection_that_ends_after_the_takeover_ends_properly => super::a_connection_that_ends_after_the_takeover_ends_properly;
}}
