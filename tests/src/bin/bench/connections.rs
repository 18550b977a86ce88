//! New connections, each opened, closed by the client, and closed by the service.

use std::io::{ErrorKind, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::VIP;
use tests::agent::port;
use tests::patience::PATIENCE;
use tests::report::{Figure, median, range, row, table};

use crate::meter::{COSTS, Reading, Usage, costs};
use crate::site::{Arm, Site, Turns, pin_client, ratios};

const ARMS: [Arm; 4] = [Arm::Bare, Arm::Async, Arm::Sync, Arm::SyncLink];
const PARALLEL: [usize; 2] = [1, 16];
const SPAN: Duration = Duration::from_millis(1000);
/// Until the standby has reaped what has ended, so that each round finds it empty.
const SETTLE: Duration = Duration::from_millis(3500);
/// Above this a median says no more.
const ROUNDS_MOST: usize = 5;
/// Of bare.
const TARGET: f64 = 0.7;

struct Opened {
    per_second: f64,
    /// The longest that any took from SYN to the service's FIN.
    longest: Duration,
    /// So many were reset, as without RFSIS, too: two CPUs may look for a connection while one of them puts it in the
    /// place of its request, and then neither is found (`inet_ehash_insert`, net/ipv4/inet_hashtables.c).
    resets: u64,
    usage: Usage,
}

pub fn measure(runs: usize) -> Result<Vec<Figure>> {
    let rounds = runs.min(ROUNDS_MOST);
    println!(
        "### New connections to `echo`, opened and closed, endpoints pinned: median (least–greatest) of {rounds} \
         paired rounds\n"
    );
    let mut rows = vec![row([
        "in parallel",
        "protection",
        "connections/s",
        "of bare",
        "longest",
        "reset",
        "client's retransmissions",
        "flows that the standby refused",
    ])];
    let head = row(["in parallel", "protection"]);
    let mut spent = vec![[&head[..], &row(COSTS)].concat()];
    let (mut figures, mut turns) = (Vec::new(), Turns::new(&ARMS));
    for parallel in PARALLEL {
        let outcomes = turns.measure(rounds, |site| open(site, parallel))?;
        for arm in ARMS {
            let rates: Vec<f64> = outcomes[&arm].iter().map(|o| o.per_second).collect();
            let of_bare = ratios(&outcomes, arm, Arm::Bare, |o| o.per_second);
            let longest = outcomes[&arm].iter().map(|o| o.longest).max();
            let usages: Vec<&Usage> = outcomes[&arm].iter().map(|o| &o.usage).collect();
            let head = [parallel.to_string(), arm.name().to_owned()];
            spent.push([&head[..], &costs(&usages)].concat());
            let sum = |of: fn(&Usage) -> f64| usages.iter().map(|u| of(u)).sum::<f64>();
            let cells = [
                format!("{:.0}", median(&rates)),
                range(&of_bare, ""),
                format!("{:.1?}", longest.unwrap_or_default()),
                outcomes[&arm]
                    .iter()
                    .map(|o| o.resets)
                    .sum::<u64>()
                    .to_string(),
                sum(|u| u.client_repeats as f64).to_string(),
                sum(|u| u.refused).to_string(),
            ];
            rows.push([&head[..], &cells].concat());
            if matches!(arm, Arm::Sync | Arm::SyncLink) {
                figures.push(Figure::at_least(
                    format!(
                        "new connections/s, {parallel} in parallel, {}: of bare",
                        arm.name()
                    ),
                    median(&of_bare),
                    TARGET,
                    |ratio| format!("{ratio:.2}"),
                ));
            }
        }
    }
    println!(
        "{}\n{}\nVoid runs: {}\n",
        table(&rows),
        table(&spent),
        turns.void
    );
    Ok(figures)
}

fn open(site: &Site, parallel: usize) -> Result<Opened> {
    let stop = AtomicBool::new(false);
    let (count, resets) = (AtomicU64::new(0), AtomicU64::new(0));
    let (before, began) = (Reading::take(site)?, Instant::now());
    let (longest, elapsed, usage) = site.lab.client().run(|| {
        std::thread::scope(|scope| {
            let openers: Vec<_> = (0..parallel)
                .map(|_| scope.spawn(|| open_and_close(&stop, &count, &resets)))
                .collect();
            std::thread::sleep(SPAN);
            let after = Reading::take(site);
            stop.store(true, Ordering::Relaxed);
            let mut longest = Duration::ZERO;
            for opener in openers {
                longest = longest.max(opener.join().ok().context("a client panicked")??);
            }
            Ok::<_, anyhow::Error>((longest, began.elapsed(), after?.since(&before)))
        })
    })?;
    std::thread::sleep(SETTLE);
    Ok(Opened {
        per_second: count.into_inner() as f64 / elapsed.as_secs_f64(),
        longest,
        resets: resets.into_inner(),
        usage,
    })
}

/// One connection after the other; returns how long the longest took.
fn open_and_close(stop: &AtomicBool, count: &AtomicU64, resets: &AtomicU64) -> Result<Duration> {
    pin_client()?;
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let mut client = TcpStream::connect_timeout(&SocketAddr::from((VIP, port::ECHO)), PATIENCE)
            .context("connecting")?;
        client.set_read_timeout(Some(PATIENCE))?;
        client.shutdown(Shutdown::Write)?;
        match client.read(&mut [0]) {
            Ok(read) => ensure!(read == 0, "the service said something"),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                resets.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            Err(error) => return Err(error).context("waiting for the service's FIN"),
        }
        longest = longest.max(began.elapsed());
        count.fetch_add(1, Ordering::Relaxed);
    }
    Ok(longest)
}
