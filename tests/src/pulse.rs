//! A connection that says a number every millisecond and notes when each comes back: the longest
//! gap between two echoes is the blackout that a client sees.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::agent::port;
use crate::client::connect;
use crate::lab::Lab;

/// Time between two numbers.
const PERIOD: Duration = Duration::from_millis(1);

/// A live echo connection at 1 kHz.
#[derive(Debug)]
pub struct Pulse {
    over: Arc<AtomicBool>,
    echoed: Arc<AtomicU64>,
    speaker: JoinHandle<Result<u64>>,
    listener: JoinHandle<Result<Vec<Instant>>>,
}

impl Pulse {
    /// Connects to the echo service and begins.
    ///
    /// # Errors
    /// When the connection cannot be made.
    pub fn start(lab: &Lab) -> Result<Self> {
        let stream = connect(lab, port::ECHO)?;
        let (over, echoed) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (mouth, speaking) = (stream.try_clone()?, Arc::clone(&over));
        let count = Arc::clone(&echoed);
        Ok(Self {
            speaker: std::thread::spawn(move || speak(mouth, &speaking)),
            listener: std::thread::spawn(move || listen(stream, &count)),
            over,
            echoed,
        })
    }

    /// Numbers that have come back so far.
    pub fn echoed(&self) -> u64 {
        self.echoed.load(Ordering::Relaxed)
    }

    /// Waits until this many more numbers have come back.
    ///
    /// # Panics
    /// When they do not.
    #[track_caller]
    pub fn beat_on(&self, numbers: u64) {
        let goal = self.echoed() + numbers;
        let what = format!("{numbers} more echoes");
        crate::patience::wait_until(&what, || self.echoed(), |&echoed| echoed >= goal);
    }

    /// Ends the connection properly and returns what the client saw.
    ///
    /// # Errors
    /// When the connection was reset, or an echo was wrong or missing.
    pub fn finish(self) -> Result<Blackout> {
        let echoes = self.end()?;
        Ok(Blackout {
            longest: echoes
                .longest_gap(None, None)
                .context("fewer than two echoes")?,
            spoken: echoes.0.len() as u64,
        })
    }

    /// Ends the connection properly and returns when each echo came.
    ///
    /// # Errors
    /// When the connection was reset, or an echo was wrong or missing.
    pub fn end(self) -> Result<Echoes> {
        self.over.store(true, Ordering::Relaxed);
        let spoken = self.speaker.join().ok().context("the speaker panicked")??;
        let echoes = self
            .listener
            .join()
            .ok()
            .context("the listener panicked")??;
        ensure!(
            echoes.len() as u64 == spoken,
            "{} of {spoken} echoes",
            echoes.len()
        );
        Ok(Echoes(echoes))
    }
}

/// When each echo came.
#[derive(Clone, Debug)]
pub struct Echoes(Vec<Instant>);

impl Echoes {
    /// Longest time between two echoes, of those that begins in the time given; `None` if none does.
    pub fn longest_gap(&self, from: Option<Instant>, until: Option<Instant>) -> Option<Duration> {
        let pairs = self.0.windows(2);
        let pairs = pairs.filter(|pair| from.is_none_or(|from| pair[0] >= from));
        let pairs = pairs.filter(|pair| until.is_none_or(|until| pair[0] < until));
        pairs.map(|pair| pair[1] - pair[0]).max()
    }
}

/// What the client saw.
#[derive(Clone, Copy, Debug)]
pub struct Blackout {
    /// Longest time between two echoes.
    pub longest: Duration,
    /// Numbers sent, each of which came back exactly once and in order.
    pub spoken: u64,
}

fn speak(mut stream: TcpStream, over: &AtomicBool) -> Result<u64> {
    let (mut number, mut due) = (0_u64, Instant::now());
    while !over.load(Ordering::Relaxed) {
        stream
            .write_all(&number.to_be_bytes())
            .context("sending a number")?;
        number += 1;
        due += PERIOD;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(number)
}

fn listen(mut stream: TcpStream, count: &AtomicU64) -> Result<Vec<Instant>> {
    let (mut buffer, mut filled, mut arrivals) = (vec![0; 64 * 1024], 0, Vec::new());
    loop {
        let read = stream
            .read(&mut buffer[filled..])
            .context("waiting for an echo")?;
        if read == 0 {
            return Ok(arrivals);
        }
        let now = Instant::now();
        filled += read;
        let whole = filled - filled % 8;
        for number in buffer[..whole].chunks_exact(8) {
            let expected = arrivals.len() as u64;
            ensure!(
                number == expected.to_be_bytes(),
                "echo {expected} is {number:?}"
            );
            arrivals.push(now);
        }
        count.store(arrivals.len() as u64, Ordering::Relaxed);
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Host, VIP};
    use std::net::TcpListener;

    #[test]
    fn the_longest_gap_between_echoes_is_the_pause_of_the_server() {
        let lab = Lab::new();
        let node = lab.host(Host::A);
        node.sh(&format!("ip addr add {VIP}/24 dev eth0")).unwrap();
        let listener = node.run(|| TcpListener::bind((VIP, port::ECHO))).unwrap();
        const PAUSE: Duration = Duration::from_millis(300);
        std::thread::spawn(move || {
            let (mut stream, mut paused) = (listener.accept().unwrap().0, false);
            let (mut buffer, mut seen) = (vec![0; 4096], 0);
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                seen += read;
                if seen > 800 && !paused {
                    std::thread::sleep(PAUSE);
                    paused = true;
                }
                stream.write_all(&buffer[..read]).unwrap();
            }
        });
        let pulse = Pulse::start(&lab).unwrap();
        pulse.beat_on(200);
        let blackout = pulse.finish().unwrap();
        assert!(blackout.longest >= PAUSE - PERIOD * 50, "{blackout:?}");
        assert!(blackout.spoken >= 200);
    }
}
