//! A standby that does not keep up: its ring is small, and it is stopped while clients transfer.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tests::agent::port;
use tests::client::{Noise, chargen_exactly, connect, hears, parts, says};
use tests::patience::{Over, wait_at_most};
use tests::{Agent, Capture, Death, Lab, Pair, Settings, Wiring};

/// What the clients do, by service and seed of the noise.
const TRANSFERS: [(u16, u64); 4] = [
    (port::ECHO, 1),
    (port::CHARGEN, 0),
    (port::ECHO, 2),
    (port::ECHO, 3),
];
/// Bytes at a time.
const PIECE: usize = 64 << 10;
/// Until a standby that was stopped has all flows again.
const TO_RECOVER: Duration = Duration::from_secs(60);

const FRAMES: [(&str, &str); 1] = [("ring", "frames")];

fn tiny_ring(wiring: Wiring) -> Settings {
    Settings {
        ring_bytes: Some("64KiB".into()),
        ..wiring.settings()
    }
}

fn dropped(agent: &Agent) -> f64 {
    agent.metrics().sum("rfsis_ring_dropped_total", &FRAMES)
}

/// Transfers while `body` does what it likes to the nodes, and how each ended.
fn while_transferring(lab: &Lab, body: impl FnOnce(&AtomicU64)) -> Vec<Result<()>> {
    let streams = TRANSFERS.map(|(port, seed)| (port, seed, connect(lab, port).unwrap()));
    let (progress, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let transfers = streams.each_ref().map(|(port, seed, stream)| {
            let (progress, over) = (&progress, &over);
            scope.spawn(move || match *port {
                port::CHARGEN => generate(stream, progress, over),
                _ => talk(stream, *seed, progress, over),
            })
        });
        let over = Over(&over);
        body(&progress);
        drop(over);
        transfers.map(|transfer| transfer.join().unwrap()).into()
    })
}

fn generate(stream: &TcpStream, progress: &AtomicU64, over: &AtomicBool) -> Result<()> {
    let mut from = 0;
    while !over.load(Ordering::Relaxed) {
        chargen_exactly(stream, from, PIECE as u64, progress)?;
        from += PIECE as u64;
    }
    Ok(())
}

fn talk(mut stream: &TcpStream, seed: u64, progress: &AtomicU64, over: &AtomicBool) -> Result<()> {
    let (mut noise, mut said, mut heard) = (Noise::new(seed), vec![0; PIECE], vec![0; PIECE]);
    while !over.load(Ordering::Relaxed) {
        noise.fill(&mut said);
        stream.write_all(&said).context("sending")?;
        stream.read_exact(&mut heard).context("reading")?;
        ensure!(said == heard, "wrong bytes");
        progress.fetch_add(PIECE as u64, Ordering::Relaxed);
    }
    parts(stream)
}

/// Waits until so many bytes more have come.
fn moved(progress: &AtomicU64, bytes: u64) {
    let goal = progress.load(Ordering::Relaxed) + bytes;
    let now = || progress.load(Ordering::Relaxed);
    wait_at_most(TO_RECOVER, "more bytes", now, |&now| now >= goal);
}

/// What it has not read is lost, so it lacks bytes of all flows; then it gets them all over again.
#[test]
fn a_standby_that_was_stopped_beyond_its_ring_gets_all_flows_again_and_protects_them() {
    let lab = Wiring::Mirror.lab();
    let pair = Pair::start_guarding(&lab, &tiny_ring(Wiring::Mirror));
    let idle = connect(&lab, port::ECHO).unwrap();
    let capture = Capture::start(&lab);
    let ended = while_transferring(&lab, |progress| {
        for _ in 0..3 {
            moved(progress, 1 << 20);
            let before = dropped(&pair.backup);
            pair.backup.stop();
            // Nobody confirms: clients wait until the gate opens, and no longer.
            pair.primary.wait_protection("degraded");
            // Who hears of it finds no count from before it.
            let guarded = TRANSFERS.len() + 1;
            let protection = &pair.primary.status().unwrap()["protection"];
            assert_eq!(
                (&protection["guarded"], &protection["exposed"]),
                (&0.into(), &guarded.into())
            );
            moved(progress, 4 << 20);
            pair.backup.cont();
            pair.backup
                .wait_metric("rfsis_ring_dropped_total", &FRAMES, before + 1.0);
            wait_at_most(
                TO_RECOVER,
                "all flows guarded",
                || pair.primary.status().unwrap(),
                |status| {
                    status["protection"]["guarded"] == guarded
                        && status["protection"]["exposed"] == 0
                },
            );
        }
        println!("copies lost: {}", dropped(&pair.backup));
        let status = pair.backup.status().unwrap();
        assert_eq!(
            (&status["state"], &status["epoch"]),
            (&"standby".into(), &1.into())
        );
        moved(progress, 1 << 20);
        pair.primary_dies(&lab, Death::Kill9);
        pair.wait_takeover();
        moved(progress, 1 << 20);
    });
    for end in ended {
        end.unwrap();
    }
    says(&idle, 1).unwrap();
    hears(&idle, 1).unwrap();
    let trace = capture.stop();
    trace.no_reset_from_vip().unwrap();
    trace.no_byte_from_vip_changed().unwrap();
}

/// The active dies while the standby is stopped. Returns how many of the transfers were reset; the others are
/// exact, and whoever lacked nothing goes on.
fn dies_while_the_standby_is_stopped(wiring: Wiring, degraded: bool) -> usize {
    let lab = wiring.lab();
    let pair = Pair::start(&lab, &tiny_ring(wiring));
    pair.primary.wait_not_degraded();
    let idle = connect(&lab, port::ECHO).unwrap();
    goes_on(&idle);
    let capture = Capture::start(&lab);
    let ended = while_transferring(&lab, |progress| {
        moved(progress, 1 << 20);
        pair.backup.stop();
        if degraded {
            pair.primary.wait_protection("degraded");
        }
        moved(progress, 4 << 20);
        pair.primary_dies(&lab, Death::Kill9);
        pair.backup.cont();
        pair.wait_takeover();
        goes_on(&idle);
    });
    println!("copies lost: {}", dropped(&pair.backup));
    let trace = capture.stop();
    trace.no_byte_from_vip_changed().unwrap();
    goes_on(&connect(&lab, port::ECHO).unwrap());
    let is_reset = |error: &anyhow::Error| {
        let kind = error.downcast_ref().map(std::io::Error::kind);
        kind.is_some_and(|kind| [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&kind))
    };
    let mut resets = 0;
    for (end, (port, seed)) in ended.into_iter().zip(TRANSFERS) {
        if let Err(error) = end {
            assert!(is_reset(&error), "port {port}, seed {seed}: {error:#}");
            resets += 1;
        }
    }
    println!("{resets} of {} were reset", TRANSFERS.len());
    resets
}

fn goes_on(stream: &TcpStream) {
    says(stream, 1).unwrap();
    hears(stream, 1).unwrap();
}

/// Nothing was told that it did not confirm before it was stopped: the download goes on, the others wait.
#[test]
fn an_active_that_dies_while_the_standby_is_stopped_costs_nothing_while_clients_wait_for_it() {
    assert_eq!(dies_while_the_standby_is_stopped(Wiring::Mirror, false), 0);
}

/// Clients were told of bytes that it never got, and of their connections none may go on with others.
#[test]
fn an_active_that_dies_degraded_costs_the_connections_of_which_the_standby_lacks_bytes() {
    assert!(dies_while_the_standby_is_stopped(Wiring::Mirror, true) > 0);
}

#[test]
fn without_ack_gate_an_active_that_dies_costs_the_connections_of_which_copies_were_lost() {
    assert!(dies_while_the_standby_is_stopped(Wiring::MirrorAsync, false) > 0);
}
