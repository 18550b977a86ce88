//! Bulk data between a client and the virtual IP, as fast as it goes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::agent::port;
use tests::client::connect;
use tests::report::median;

use crate::meter::{Reading, Usage};
use crate::site::{Site, pin_client};

/// How long a load runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(300);
/// Then it is measured in parts, of which the median counts: what else the machine does comes in bursts of a second or two.
const PART: Duration = Duration::from_millis(250);
/// How many parts, of all connections of a load, and of a single one that is measured alone.
const PARTS: usize = 10;
const PARTS_ALONE: usize = 24;
/// Then every connection moves within this: one that has got stuck in between is not slow, but broken.
const GOES_ON: Duration = Duration::from_secs(1);
/// After the connections are closed, until the next load.
const SETTLE: Duration = Duration::from_millis(200);
/// Bytes per call.
const CHUNK: usize = 64 << 10;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Client to `discard`.
    Up,
    /// `chargen` to client.
    Down,
}

impl Way {
    /// Both.
    pub const ALL: [Way; 2] = [Way::Up, Way::Down];

    /// As the tables call it.
    pub const fn name(self) -> &'static str {
        match self {
            Way::Up => "up",
            Way::Down => "down",
        }
    }
}

/// What was transferred, and what it cost.
pub struct Bulk {
    /// Gbit/s of payload, all connections together. What was written and waits in the client's buffer counts:
    /// some 4 MiB at the most, on both sides of each part.
    pub gigabits: f64,
    /// What else happened meanwhile.
    pub usage: Usage,
}

/// Loads so many connections one way.
///
/// # Errors
/// When a connection fails, or stands still.
pub fn load(site: &Site, way: Way, connections: usize) -> Result<Bulk> {
    let port = match way {
        Way::Up => port::DISCARD,
        Way::Down => port::CHARGEN,
    };
    let clients = (0..connections)
        .map(|_| connect(&site.lab, port))
        .collect::<Result<Vec<_>>>()?;
    let moved: Vec<AtomicU64> = clients.iter().map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        let movers: Vec<_> = clients
            .iter()
            .zip(&moved)
            .map(|(client, moved)| {
                let stop = &stop;
                scope.spawn(move || transfer(client, way, moved, stop))
            })
            .collect();
        let measured = observe(site, &moved);
        stop.store(true, Ordering::Relaxed);
        for mover in movers {
            mover.join().ok().context("a client panicked")??;
        }
        measured
    });
    drop(clients);
    std::thread::sleep(SETTLE);
    outcome
}

/// Gbit/s of payload on one open connection, once it has warmed up.
///
/// # Errors
/// When it fails, or stands still.
pub fn speed(client: &TcpStream, way: Way) -> Result<f64> {
    let (moved, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| transfer(client, way, &moved, &stop));
        std::thread::sleep(WARM_UP);
        let gigabits = watch(std::slice::from_ref(&moved), PARTS_ALONE);
        stop.store(true, Ordering::Relaxed);
        mover.join().ok().context("a client panicked")??;
        ensure!(gigabits > 0.0, "a connection stood still");
        Ok(gigabits)
    })
}

/// Gbit/s of all connections together, as it is in the median of so many parts.
fn watch(moved: &[AtomicU64], parts: usize) -> f64 {
    let bytes = || -> u64 { moved.iter().map(|each| each.load(Ordering::Relaxed)).sum() };
    let speeds: Vec<f64> = (0..parts)
        .map(|_| {
            let (before, began) = (bytes(), Instant::now());
            std::thread::sleep(PART);
            (bytes() - before) as f64 * 8.0 / 1e9 / began.elapsed().as_secs_f64()
        })
        .collect();
    median(&speeds)
}

fn observe(site: &Site, moved: &[AtomicU64]) -> Result<Bulk> {
    let bytes = || moved.iter().map(|each| each.load(Ordering::Relaxed));
    std::thread::sleep(WARM_UP);
    let before = Reading::take(site)?;
    let bytes_before: Vec<u64> = bytes().collect();
    let gigabits = watch(moved, PARTS);
    let bytes_after: Vec<u64> = bytes().collect();
    let usage = Reading::take(site)?.since(&before);
    let each = bytes_after.iter().zip(&bytes_before).map(|(a, b)| a - b);
    ensure!(
        each.clone().all(|bytes| bytes > 0),
        "a connection stood still: bytes of each {:?}",
        each.collect::<Vec<_>>()
    );
    let moves = || bytes().zip(&bytes_after).all(|(now, then)| now > *then);
    let limit = Instant::now() + GOES_ON;
    while !moves() {
        ensure!(Instant::now() < limit, "a connection got stuck");
        std::thread::sleep(GOES_ON / 100);
    }
    Ok(Bulk { gigabits, usage })
}

fn transfer(mut client: &TcpStream, way: Way, moved: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    pin_client()?;
    let mut chunk = vec![0x5a; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        let count = match way {
            Way::Up => client.write(&chunk).context("sending")?,
            Way::Down => client.read(&mut chunk).context("receiving")?,
        };
        ensure!(count > 0, "the service has closed");
        moved.fetch_add(count as u64, Ordering::Relaxed);
    }
    Ok(())
}
