//! After a takeover live flows become ordinary kernel sockets, and their clients do not notice.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rfsis_agent::adopt::Numbers;
use rfsis_agent::segment::flow_key;
use rfsis_agent::tcp_repair::restore;
use socket2::SockRef;
use tests::agent::port;
use tests::client::{
    Noise, chargen_exactly, check_stream, connect, echo_exactly, hears, parts, says, tcp_sockets,
};
use tests::patience::{Over, slowed, wait_until};
use tests::{
    Agent, Capture, Cluster, Death, Failover, Host, Lab, LabOptions, Pair, VIP, Wiring,
    on_each_wiring,
};

const ADOPTED: [(&str, &str); 1] = [("result", "adopted")];
const PASSED_ON: [(&str, &str); 1] = [("result", "passed_on")];
const ESTABLISHED: u8 = 1;

/// The client's connections that the kernel of `host` has, established.
fn in_the_kernel(lab: &Lab, host: Host) -> usize {
    let sockets = tcp_sockets(lab.host(host), Host::Client.address());
    sockets
        .iter()
        .filter(|(_, state)| *state == ESTABLISHED)
        .count()
}

/// Waits until the survivor's kernel has adopted all of its flows.
fn wait_adopted(lab: &Lab, survivor: &Agent, count: usize) {
    survivor.wait_metric("rfsis_adoptions_total", &ADOPTED, count as f64);
    survivor.wait_flows("live", 0);
    assert_eq!(in_the_kernel(lab, survivor.host()), count);
}

fn echoes(stream: &TcpStream, seed: u64) {
    says(stream, seed).unwrap();
    hears(stream, seed).unwrap();
}

fn idle_connections_are_adopted(wiring: Wiring) {
    const COUNT: usize = 40;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let capture = Capture::start(&lab);
    let streams: Vec<_> = (0..COUNT)
        .map(|_| connect(&lab, port::ECHO).unwrap())
        .collect();
    for (stream, seed) in streams.iter().zip(1..) {
        echoes(stream, seed);
    }
    pair.backup.wait_flows("lockstep", COUNT as u64);
    assert_eq!(in_the_kernel(&lab, Host::B), 0);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    wait_adopted(&lab, &pair.backup, COUNT);
    // Nobody protects them until a standby has joined them.
    pair.backup.wait_flows("unprotected", COUNT as u64);
    pair.backup
        .wait_status("all of them at risk", |status| status["at_risk"] == COUNT);
    for (stream, seed) in streams.iter().zip(1_000..) {
        echo_exactly(stream, 100_000, seed, &AtomicU64::new(0)).unwrap();
    }
    pair.backup.wait_flows("unprotected", 0);
    let scrape = pair.backup.metrics();
    assert_eq!(
        scrape.sum("rfsis_adoptions_total", &[("result", "failed")]),
        0.0
    );
    assert_eq!(
        scrape.sum("rfsis_adoption_duration_seconds_count", &[]),
        COUNT as f64
    );
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
}

/// Nobody has said anything yet, but for the handshake: what that promised the client counts in the kernel, too.
fn connections_that_were_silent_so_far_are_adopted_and_hear_the_first_answer(wiring: Wiring) {
    const COUNT: usize = 100;
    let lab = wiring.lab();
    // Repeated would be what was lost, not what was late.
    let route = format!("ip route add {VIP}/32 dev eth0 rto_min 20s");
    lab.client().sh(&route).unwrap();
    let pair = Pair::start(&lab, &wiring.settings());
    let streams: Vec<_> = (0..COUNT)
        .map(|_| connect(&lab, port::ECHO).unwrap())
        .collect();
    pair.backup.wait_flows("lockstep", COUNT as u64);
    pair.primary_dies(&lab, Death::Stop);
    wait_adopted(&lab, &pair.backup, COUNT);
    let before = lab.client().repeated().unwrap();
    for (stream, seed) in streams.iter().zip(1..) {
        echoes(stream, seed);
    }
    assert_eq!(lab.client().repeated().unwrap(), before);
}

/// Asks and waits for the answer, again and again, about 1,000 times a second.
fn converse(stream: &TcpStream, stop: &AtomicBool, seed: u64) {
    for turn in 0.. {
        echoes(stream, seed + turn);
        if stop.load(Ordering::Relaxed) {
            return parts(stream).unwrap();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn conversations_are_adopted_between_two_words(wiring: Wiring) {
    const COUNT: usize = 8;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let streams: Vec<_> = (0..COUNT)
        .map(|_| connect(&lab, port::ECHO).unwrap())
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (stream, seed) in streams.iter().zip(1..) {
            let stop = &stop;
            scope.spawn(move || converse(stream, stop, seed << 32));
        }
        let _over = Over(&stop);
        pair.backup.wait_flows("lockstep", COUNT as u64);
        pair.primary_dies(&lab, Death::Kill9);
        pair.wait_takeover();
        wait_adopted(&lab, &pair.backup, COUNT);
    });
    pair.backup.wait_flows("unprotected", 0);
}

/// As [`converse`], but says a second word shortly behind the first, before it is answered. Returns how long it waited for
/// both at the most.
fn talk(stream: &TcpStream, stop: &AtomicBool, seed: u64) -> Duration {
    let (mut longest, mut turn) = (Duration::ZERO, seed);
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        says(stream, turn).unwrap();
        while asked.elapsed() < Duration::from_micros(turn % 64) {
            std::hint::spin_loop();
        }
        says(stream, turn + 1).unwrap();
        hears(stream, turn).unwrap();
        hears(stream, turn + 1).unwrap();
        longest = longest.max(asked.elapsed());
        turn += 2;
        std::thread::sleep(Duration::from_millis(1));
    }
    parts(stream).unwrap();
    longest
}

/// A frame that comes for a shadow while that becomes a kernel socket is lost by nobody: a client that would repeat it
/// only after a long time does not wait so long. Planned switchovers: behind a kill all clients would.
fn no_word_said_during_the_move_has_to_be_repeated(wiring: Wiring) {
    const COUNT: usize = 48;
    const REPEATED_AFTER: Duration = Duration::from_secs(5);
    const TO_REPAIR: Duration = Duration::from_secs(20);
    const SWITCHOVERS_MOST: usize = 10;
    let lab = wiring.lab_with(LabOptions {
        // No repetition before the timeout (RFC 8985 section 7).
        client_sysctls: vec![("ipv4/tcp_early_retrans", "0")],
        ..LabOptions::default()
    });
    let patient = REPEATED_AFTER.as_secs();
    let route = format!("ip route add {VIP}/32 dev eth0 rto_min {patient}s");
    lab.client().sh(&route).unwrap();
    let mut cluster = Cluster::start(&lab, &wiring.settings());
    let streams: Vec<_> = (0..COUNT)
        .map(|_| connect(&lab, port::ECHO).unwrap())
        .collect();
    let stop = AtomicBool::new(false);
    let mut late = 0.0;
    let longest = std::thread::scope(|scope| {
        let talks: Vec<_> = streams
            .iter()
            .zip(1..)
            .map(|(stream, seed)| {
                let stop = &stop;
                scope.spawn(move || talk(stream, stop, seed << 32))
            })
            .collect();
        let over = Over(&stop);
        cluster.wait_redundant(COUNT as u64, slowed(TO_REPAIR));
        for _ in 0..SWITCHOVERS_MOST {
            cluster.fail_over(Failover::Switchover);
            // Those that the kernel has adopted, all of them.
            cluster.wait_redundant(COUNT as u64, slowed(TO_REPAIR));
            late = [cluster.active(), cluster.standby()]
                .map(|agent| agent.metrics().sum("rfsis_frames_total", &PASSED_ON))
                .iter()
                .sum();
            if late > 0.0 {
                break;
            }
        }
        drop(over);
        talks.into_iter().map(|talk| talk.join().unwrap()).max()
    });
    assert!(late > 0.0, "none came late");
    assert!(longest < Some(REPEATED_AFTER), "{longest:?}, {late} late");
}

/// Sends noise until told to stop, then closes, and expects the server to close as well.
fn upload(mut stream: &TcpStream, stop: &AtomicBool, progress: &AtomicU64) {
    let (mut noise, mut chunk) = (Noise::new(1), vec![0; 16 << 10]);
    while !stop.load(Ordering::Relaxed) {
        noise.fill(&mut chunk);
        stream.write_all(&chunk).unwrap();
        progress.fetch_add(chunk.len() as u64, Ordering::Relaxed);
    }
    parts(stream).unwrap();
}

/// A transfer runs from before the kill until well after its adoption.
fn bulk_is_adopted(wiring: Wiring, service: u16) {
    const BEFORE: u64 = 4 << 20;
    const AFTER: u64 = 32 << 20;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let stream = connect(&lab, service).unwrap();
    let (progress, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let moved = |least| {
        wait_until(
            "the transfer to go on",
            || progress.load(Ordering::Relaxed),
            |&bytes| bytes >= least,
        )
    };
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| match service {
            port::DISCARD => upload(&stream, &stop, &progress),
            port::CHARGEN => {
                let mut offset = 0;
                while !stop.load(Ordering::Relaxed) {
                    chargen_exactly(&stream, offset, 1 << 20, &progress).unwrap();
                    offset += 1 << 20;
                }
            }
            _ => echo_until(&stream, &stop, &progress),
        });
        let over = Over(&stop);
        moved(BEFORE);
        pair.primary_dies(&lab, Death::Kill9);
        pair.wait_takeover();
        wait_adopted(&lab, &pair.backup, 1);
        moved(progress.load(Ordering::Relaxed) + AFTER);
        drop(over);
        transfer.join().unwrap();
    });
    assert_eq!(
        pair.backup
            .metrics()
            .sum("rfsis_adoptions_total", &[("result", "failed")]),
        0.0
    );
}

/// Sends noise and reads it back at the same time until told to stop.
fn echo_until(stream: &TcpStream, stop: &AtomicBool, progress: &AtomicU64) {
    const CHUNK: usize = 16 << 10;
    let sent = AtomicU64::new(0);
    let mut read = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut noise, mut chunk, mut out) = (Noise::new(3), vec![0; CHUNK], stream);
            while !stop.load(Ordering::Relaxed) {
                noise.fill(&mut chunk);
                out.write_all(&chunk).unwrap();
                sent.fetch_add(CHUNK as u64, Ordering::Relaxed);
            }
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let (mut noise, mut found, mut expected) = (Noise::new(3), vec![0; CHUNK], vec![0; CHUNK]);
        let mut input = stream;
        loop {
            match input.read_exact(&mut found) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
                Err(error) => panic!("{error} after {read} bytes"),
            }
            noise.fill(&mut expected);
            assert!(
                found == expected,
                "a wrong byte between {read} and the next {CHUNK}"
            );
            read += CHUNK as u64;
            progress.store(read, Ordering::Relaxed);
        }
    });
    assert_eq!(
        read,
        sent.into_inner(),
        "bytes that came back, of those that were sent"
    );
}

/// A client writes and does not read, until an echo has no room for more: nothing that it was promised room for has
/// none. The kernel would drop that, and then, of a client that has sent a little beyond the window that is closed,
/// every acknowledgement: both would wait for good.
fn what_the_client_was_promised_finds_room(wiring: Wiring) {
    const SENT: u64 = 8 << 20;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let stream = connect(&lab, port::ECHO).unwrap();
    echoes(&stream, 1);
    pair.backup.wait_flows("lockstep", 1);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    wait_adopted(&lab, &pair.backup, 1);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let (mut noise, mut chunk, mut out) = (Noise::new(5), vec![0; 64 << 10], &stream);
            for _ in 0..SENT / chunk.len() as u64 {
                noise.fill(&mut chunk);
                out.write_all(&chunk).unwrap();
            }
        });
        wait_until(
            "all that was sent to be acknowledged, and the rest to wait",
            || lab.client().sh("ss -Htin dport = :7").unwrap(),
            |socket| socket.contains(" notsent:") && !socket.contains(" unacked:"),
        );
        let mut noise = Noise::new(5);
        check_stream(&stream, SENT, &AtomicU64::new(0), |_, room| {
            noise.fill(room)
        })
        .unwrap();
        sender.join().unwrap();
    });
}

/// The client has closed its half, and reads on for ever: its flow ends where it is.
fn a_half_closed_connection_goes_on_on_its_shadow(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let half_closed = connect(&lab, port::CHARGEN).unwrap();
    half_closed.shutdown(Shutdown::Write).unwrap();
    chargen_exactly(&half_closed, 0, 1 << 20, &AtomicU64::new(0)).unwrap();
    let open = connect(&lab, port::ECHO).unwrap();
    pair.backup.wait_flows("lockstep", 2);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    pair.backup
        .wait_metric("rfsis_adoptions_total", &ADOPTED, 1.0);
    chargen_exactly(&half_closed, 1 << 20, 16 << 20, &AtomicU64::new(0)).unwrap();
    pair.backup.wait_flows("live", 1);
    assert_eq!(in_the_kernel(&lab, Host::B), 1);
    echo_exactly(&open, 10_000, 1, &AtomicU64::new(0)).unwrap();
}

/// They close a little before, during and a little after their move.
fn connections_that_close_during_the_move_close_properly(wiring: Wiring) {
    const COUNT: u64 = 150;
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let capture = Capture::start(&lab);
    let streams: Vec<_> = (0..COUNT)
        .map(|_| connect(&lab, port::ECHO).unwrap())
        .collect();
    pair.backup.wait_flows("lockstep", COUNT);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    for (stream, seed) in streams.iter().zip(1..) {
        echo_exactly(stream, 2_000, seed, &AtomicU64::new(0)).unwrap();
        std::thread::sleep(Duration::from_millis(3));
    }
    pair.backup.wait_flows("live", 0);
    pair.backup.wait_flows("unprotected", 0);
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
}

/// The server has closed first, so its end remembers them for a minute. Nobody has anything to lose by that.
fn connections_that_both_sides_have_closed_are_not_at_risk(wiring: Wiring) {
    let lab = wiring.lab();
    let mut pair = Pair::start(&lab, &wiring.settings());
    let streams: Vec<_> = (0..5)
        .map(|_| connect(&lab, port::DAYTIME).unwrap())
        .collect();
    for mut stream in &streams {
        stream.read_to_string(&mut String::new()).unwrap();
    }
    pair.backup.wait_flows("lockstep", 5);
    pair.primary_dies(&lab, Death::Kill9);
    pair.wait_takeover();
    pair.backup.wait_flows("live", 5);
    for stream in streams {
        stream.shutdown(Shutdown::Write).unwrap();
    }
    pair.backup.wait_flows("live", 0);
    pair.primary.await_exit();
    pair.primary = Agent::start(&lab, Host::A, "primary", &wiring.settings());
    for agent in [&pair.primary, &pair.backup] {
        agent.wait_status("ready", |status| {
            status["ready"] == true && status["at_risk"] == 0
        });
    }
}

/// What it has adopted dies with it in silence, and its next agent can listen.
fn an_agent_killed_right_after_adoption_says_nothing_to_its_clients(wiring: Wiring) {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &wiring.settings());
    let (primary, mut backup) = (pair.primary, pair.backup);
    let streams: Vec<_> = (0..20)
        .map(|_| connect(&lab, port::ECHO).unwrap())
        .collect();
    for (stream, seed) in streams.iter().zip(1..) {
        echoes(stream, seed);
    }
    backup.wait_flows("lockstep", 20);
    let capture = Capture::start(&lab);
    primary.kill9();
    backup.wait_metric("rfsis_adoptions_total", &ADOPTED, 1.0);
    // Unread input makes the kernel want to reset.
    for stream in &streams {
        says(stream, 5).unwrap();
    }
    backup.kill9();
    backup.await_exit();
    wait_until(
        "the kernel to close what the agent had open",
        || in_the_kernel(&lab, Host::B),
        |&count| count == 0,
    );
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    let fins = trace.segments_from_vip().filter(|segment| segment.fin);
    assert_eq!(fins.count(), 0);
    let again = Agent::start(&lab, Host::B, "backup", &wiring.settings());
    again.wait_state("active");
}

/// Killed between the making of a socket and its last option, it leaves one that does not let anybody listen
/// beside it.
fn what_an_agent_left_that_was_killed_while_it_adopted_does_not_keep_the_next_from_starting(
    wiring: Wiring,
) {
    let lab = wiring.lab();
    let mut pair = Pair::start(&lab, &wiring.settings());
    pair.backup.kill9();
    pair.backup.await_exit();
    let numbers = Numbers {
        flow: flow_key(Host::Client.address(), 40_000, port::ECHO),
        vip: VIP,
        snd_nxt: 1,
        rcv_nxt: 1,
        snd_wnd: 60_000,
        rcv_wnd: 60_000,
        mss: 1460,
        shifts: None,
        sack: true,
        timestamp: None,
    };
    let half_made = lab.host(Host::B).run(|| restore(&numbers)).unwrap();
    SockRef::from(&half_made).set_reuse_address(false).unwrap();
    drop(half_made);
    let left = || tcp_sockets(lab.host(Host::B), Host::Client.address());
    assert_eq!(left().len(), 1, "the gate holds its FIN");
    pair.backup = Agent::start(&lab, Host::B, "backup", &wiring.settings());
    pair.backup.wait_state("standby");
    wait_until("no stale socket", left, Vec::is_empty);
}

on_each_wiring! { [lan: Lan, mirror: Mirror, mirror_offloaded: MirrorOffloaded] {
    idle_connections_are_adopted => super::idle_connections_are_adopted;
    connections_that_were_silent_so_far_are_adopted_and_hear_the_first_answer =>
        super::connections_that_were_silent_so_far_are_adopted_and_hear_the_first_answer;
    conversations_are_adopted_between_two_words => super::conversations_are_adopted_between_two_words;
    a_download_is_adopted => |wiring| bulk_is_adopted(wiring, port::CHARGEN);
    an_upload_is_adopted => |wiring| bulk_is_adopted(wiring, port::DISCARD);
    what_the_client_was_promised_finds_room => super::what_the_client_was_promised_finds_room;
    an_echo_in_bulk_is_adopted => |wiring| bulk_is_adopted(wiring, port::ECHO);
}}

on_each_wiring! { [on_a_switch: Mirror] {
    no_word_said_during_the_move_has_to_be_repeated => super::no_word_said_during_the_move_has_to_be_repeated;
    a_half_closed_connection_goes_on_on_its_shadow => super::a_half_closed_connection_goes_on_on_its_shadow;
    connections_that_close_during_the_move_close_properly =>
        super::connections_that_close_during_the_move_close_properly;
    an_agent_killed_right_after_adoption_says_nothing_to_its_clients =>
        super::an_agent_killed_right_after_adoption_says_nothing_to_its_clients;
    connections_that_both_sides_have_closed_are_not_at_risk =>
        super::connections_that_both_sides_have_closed_are_not_at_risk;
    what_an_agent_left_that_was_killed_while_it_adopted_does_not_keep_the_next_from_starting =>
        super::what_an_agent_left_that_was_killed_while_it_adopted_does_not_keep_the_next_from_starting;
}}
