//! A standby that starts while connections run gets each of them over the sync channel, and then carries them
//! across the active's death as if it had been there from their first byte on.

#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::agent::{Tap, port};
use tests::client::{chargen_exactly, connect, expect_end, hears, parts, says};
use tests::faults::{Fault, Traffic};
use tests::patience::wait_at_most;
use tests::pulse::Pulse;
use tests::report::millis;
use tests::{Agent, Host, Lab, Settings, Wiring, on_each_wiring};

const GUARDED: &str = "rfsis_guarded_flows";
const JOINS: &str = "rfsis_late_joins_total";

/// Bytes that the clients of one stream read, or write, before they look whether it is over.
const PIECE: u64 = 256 << 10;

/// Joining may take this long beside transfers at full speed on a slow, shared machine.
const TO_JOIN: Duration = Duration::from_secs(60);

/// A silence of the standby is not what is tested here: a stall of the machine must not open the gate.
fn patient(settings: Settings) -> Settings {
    Settings {
        protect_timeout: Some("20s".into()),
        ..settings
    }
}

/// Connections of every kind, each in the midst of something.
struct Clients {
    idle: Vec<TcpStream>,
    pulse: Pulse,
    /// Echoes at once what is said, again and again.
    talk: TcpStream,
    download: TcpStream,
    /// Its client has closed its side.
    half_closed: TcpStream,
    upload: TcpStream,
    over: AtomicBool,
    moved: [AtomicU64; 4],
}

const IDLE: usize = 5;
const FLOWS: u64 = IDLE as u64 + 5;

impl Clients {
    fn connect(lab: &Lab) -> Self {
        let idle: Vec<_> = (0..IDLE)
            .map(|_| connect(lab, port::ECHO).unwrap())
            .collect();
        for (stream, seed) in idle.iter().zip(0..) {
            says(stream, seed).unwrap();
            hears(stream, seed).unwrap();
        }
        let half_closed = connect(lab, port::CHARGEN).unwrap();
        half_closed.shutdown(Shutdown::Write).unwrap();
        Self {
            idle,
            pulse: Pulse::start(lab).unwrap(),
            talk: connect(lab, port::ECHO).unwrap(),
            download: connect(lab, port::CHARGEN).unwrap(),
            half_closed,
            upload: connect(lab, port::DISCARD).unwrap(),
            over: AtomicBool::new(false),
            moved: Default::default(),
        }
    }

    /// Does `body` while all of them are busy, then ends them: every byte must have come.
    fn while_busy<T>(self, body: impl FnOnce(&Self) -> T) {
        // What `body` returns lives as long as the clients.
        let _alive = std::thread::scope(|scope| {
            let [talk, download, half_closed, upload] = &self.moved;
            let tasks = [
                scope.spawn(|| self.talk(talk)),
                scope.spawn(|| self.generate(&self.download, download)),
                scope.spawn(|| self.generate(&self.half_closed, half_closed)),
                scope.spawn(|| self.upload(upload)),
            ];
            self.go_on();
            let alive = body(&self);
            self.over.store(true, Ordering::Relaxed);
            for task in tasks {
                task.join().unwrap().unwrap();
            }
            alive
        });
        for (stream, seed) in self.idle.iter().zip(100..) {
            says(stream, seed).unwrap();
            hears(stream, seed).unwrap_or_else(|error| panic!("idle until now: {error:#}"));
            parts(stream).unwrap();
        }
        self.pulse.finish().unwrap();
    }

    /// Waits until each has moved some bytes.
    fn go_on(&self) {
        let moved = || {
            let moved = self.moved.each_ref();
            moved.map(|bytes| bytes.load(Ordering::Relaxed))
        };
        let before = moved();
        wait_at_most(TO_JOIN, "bytes on every stream", moved, |now| {
            now.iter().zip(before).all(|(now, before)| *now > before)
        });
        self.pulse.beat_on(20);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn talk(&self, moved: &AtomicU64) -> Result<()> {
        for seed in 0.. {
            says(&self.talk, seed)?;
            hears(&self.talk, seed).with_context(|| format!("exchange {seed}"))?;
            moved.fetch_add(1, Ordering::Relaxed);
            if self.is_over() {
                break;
            }
        }
        parts(&self.talk)
    }

    fn generate(&self, stream: &TcpStream, moved: &AtomicU64) -> Result<()> {
        let mut from = 0;
        while !self.is_over() {
            chargen_exactly(stream, from, PIECE, moved)
                .with_context(|| format!("from offset {from}"))?;
            from += PIECE;
        }
        ensure!(from > 0, "nothing was read");
        Ok(())
    }

    fn upload(&self, moved: &AtomicU64) -> Result<()> {
        let piece = vec![0x55; PIECE as usize];
        while !self.is_over() {
            (&self.upload).write_all(&piece).context("uploading")?;
            moved.fetch_add(PIECE, Ordering::Relaxed);
        }
        // Discard closes when it has got the client's FIN, and so everything before it.
        self.upload.shutdown(Shutdown::Write)?;
        expect_end(&self.upload)
    }
}

/// The primary alone, active.
fn primary_alone(lab: &Lab, settings: &Settings) -> Agent {
    let primary = Agent::start(lab, Host::A, "primary", settings);
    primary.wait_state("active");
    primary
}

/// Waits until the backup has each of so many flows, and the primary guards it.
#[track_caller]
fn wait_joined(primary: &Agent, backup: &Agent, flows: u64) {
    wait_at_most(
        TO_JOIN,
        "every flow to be guarded",
        || primary.metrics(),
        |scrape| {
            scrape.sum(GUARDED, &[("condition", "guarded")]) == flows as f64
                && scrape.sum(GUARDED, &[]) == flows as f64
        },
    );
    let status = backup.wait_flows("lockstep", flows);
    assert_eq!(status["flows"]["unprotected"], 0, "{status:#}");
    let status = primary.status().unwrap();
    assert_eq!(status["protection"]["guarded"], flows, "{status:#}");
}

fn joined(primary: &Agent) -> f64 {
    primary.metrics().sum(JOINS, &[("result", "joined")])
}

/// Kills the primary's agent while the clients are busy: everything goes on.
fn survives_the_primary(primary: Agent, backup: &Agent, clients: &Clients) {
    primary.kill9();
    backup.wait_state("active");
    clients.go_on();
}

fn late_backup_protects(lab: &Lab, settings: &Settings) {
    let primary = primary_alone(lab, settings);
    Clients::connect(lab).while_busy(|clients| {
        let backup = Agent::start(lab, Host::B, "backup", settings);
        wait_joined(&primary, &backup, FLOWS);
        assert!(joined(&primary) >= FLOWS as f64);
        survives_the_primary(primary, &backup, clients);
        backup
    });
}

on_each_wiring! { [mirror: Mirror, offloaded: MirrorOffloaded, sync_link: MirrorOverSyncLink] {
    connections_older_than_the_backup_survive_the_primary => |wiring| {
        late_backup_protects(&wiring.lab(), &patient(wiring.settings()));
    };
}}

#[test]
fn connections_older_than_the_backup_survive_the_primary_with_tap_lan() {
    let settings = Settings {
        tap: Tap::Lan,
        sync: true,
        ..Wiring::Lan.settings()
    };
    late_backup_protects(&Wiring::Lan.lab(), &patient(settings));
}

#[test]
fn connections_survive_the_restart_of_the_backup_under_load_and_then_the_primary() {
    let lab = Wiring::Mirror.lab();
    let settings = Settings {
        // Without a backup the clients wait for so long.
        protect_timeout: Some("500ms".into()),
        ..Wiring::Mirror.settings()
    };
    let primary = primary_alone(&lab, &settings);
    let backup = Agent::start(&lab, Host::B, "backup", &settings);
    primary.wait_protection("sync");
    Clients::connect(&lab).while_busy(|clients| {
        wait_joined(&primary, &backup, FLOWS);
        assert_eq!(joined(&primary), 0.0, "the backup knew them all");
        backup.kill9();
        drop(backup);
        clients.go_on();
        let backup = Agent::start(&lab, Host::B, "backup", &settings);
        wait_joined(&primary, &backup, FLOWS);
        survives_the_primary(primary, &backup, clients);
        backup
    });
}

#[test]
fn connections_join_late_though_20_percent_of_the_sync_datagrams_and_5_of_the_copies_are_lost() {
    let (lab, settings) = (Wiring::Mirror.lab(), patient(Wiring::Mirror.settings()));
    let primary = primary_alone(&lab, &settings);
    let faults = [
        Fault::loses(Traffic::Openings, 20),
        Fault::loses(Traffic::Confirmations, 20),
        Fault::loses(Traffic::Copies, 5),
    ];
    Clients::connect(&lab).while_busy(|clients| {
        lab.suffer(&faults);
        let backup = Agent::start(&lab, Host::B, "backup", &settings);
        wait_joined(&primary, &backup, FLOWS);
        for fault in faults {
            assert!(lab.struck(fault) > 0, "{fault:?} struck nothing");
        }
        survives_the_primary(primary, &backup, clients);
        backup
    });
}

/// What it takes is printed.
#[test]
fn a_thousand_idle_connections_join_late_beside_a_live_one() {
    const CONNECTIONS: u64 = 1000;
    let (lab, settings) = (Wiring::Mirror.lab(), patient(Wiring::Mirror.settings()));
    let primary = primary_alone(&lab, &settings);
    let streams: Vec<_> = (0..CONNECTIONS)
        .map(|seed| (seed, connect(&lab, port::ECHO).unwrap()))
        .collect();
    for (seed, stream) in &streams {
        says(stream, *seed).unwrap();
        hears(stream, *seed).unwrap();
    }
    let pulse = Pulse::start(&lab).unwrap();
    pulse.beat_on(20);
    let backup = Agent::start(&lab, Host::B, "backup", &settings);
    primary.wait_protection("sync");
    let begun = Instant::now();
    wait_joined(&primary, &backup, CONNECTIONS + 1);
    let took = begun.elapsed();
    pulse.beat_on(20);
    let scrape = primary.metrics();
    let seconds = scrape.sum("rfsis_late_join_duration_seconds_sum", &[]);
    let mean = Duration::from_secs_f64(seconds / (CONNECTIONS + 1) as f64);
    let before_kill = pulse.finish().unwrap();
    println!(
        "{CONNECTIONS} idle connections joined in {} (each {} after it was asked for, on average), \
         longest gap of a live one {}",
        millis(took),
        millis(mean),
        millis(before_kill.longest)
    );
    primary.kill9();
    backup.wait_state("active");
    for (seed, stream) in &streams {
        says(stream, seed + CONNECTIONS).unwrap();
    }
    for (seed, stream) in &streams {
        hears(stream, seed + CONNECTIONS).unwrap_or_else(|error| panic!("{seed}: {error:#}"));
        parts(stream).unwrap();
    }
}

#[test]
fn what_cannot_be_handed_over_is_unprotected_and_its_client_is_told_at_the_takeover() {
    let (lab, settings) = (Wiring::Mirror.lab(), patient(Wiring::Mirror.settings()));
    let primary = primary_alone(&lab, &settings);
    let settings_of_backup = Settings {
        // It has no room for a second flow.
        max_flows: Some(1),
        ..settings.clone()
    };
    let streams = [0, 1].map(|seed| {
        let stream = connect(&lab, port::ECHO).unwrap();
        says(&stream, seed).unwrap();
        hears(&stream, seed).unwrap();
        stream
    });
    let backup = Agent::start(&lab, Host::B, "backup", &settings_of_backup);
    let status = backup.wait_flows("lockstep", 1);
    assert_eq!(status["flows"]["unprotected"], 1, "{status:#}");
    primary.wait_metric(JOINS, &[("result", "declined")], 1.0);
    primary.kill9();
    backup.wait_state("active");
    let ends = streams.each_ref().map(|stream| {
        says(stream, 7)
            .and_then(|()| hears(stream, 7))
            .map_err(|error| {
                let error = error.downcast::<std::io::Error>().unwrap();
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            })
    });
    assert_eq!(ends.iter().filter(|end| end.is_ok()).count(), 1, "{ends:?}");
}
