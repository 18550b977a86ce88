//! UDP services: one datagram in, at most one out.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use rfsis_common::maps::State;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::coop::consume_budget;

use super::ERROR_PAUSE;
use crate::handler::HandlerKind;
use crate::metrics::{Counters, DatagramResult};

/// Ports whose services answer anything: echo, discard, daytime, qotd, chargen, time.
const ANSWERING_PORTS: [u16; 6] = [7, 9, 13, 17, 19, 37];
/// Most bytes of a UDP datagram over IPv4, and one more.
const DATAGRAM_BUFFER: usize = 65_536;

/// Sources that would answer our answer: two such services never stop talking (CERT CA-1996-01).
#[derive(Debug)]
pub(crate) struct LoopSources {
    vip: Ipv4Addr,
    ports: Vec<u16>,
}

impl LoopSources {
    /// `ports` are those of our own UDP services: the peer's are the same.
    pub(crate) fn new(vip: Ipv4Addr, mut ports: Vec<u16>) -> Self {
        ports.extend(ANSWERING_PORTS);
        Self { vip, ports }
    }

    /// Whether an answer to this source would be answered.
    pub(crate) fn contains(&self, source: SocketAddr) -> bool {
        source.ip() == IpAddr::V4(self.vip) || self.ports.contains(&source.port())
    }
}

/// Answers the datagrams of one service.
pub(super) struct Answerer {
    pub handler: HandlerKind,
    pub loops: LoopSources,
    pub counters: Counters<DatagramResult>,
    pub state: watch::Receiver<State>,
}

impl Answerer {
    pub(super) async fn run(self, socket: UdpSocket) {
        let mut buffer = vec![0; DATAGRAM_BUFFER];
        loop {
            consume_budget().await;
            match socket.recv_from(&mut buffer).await {
                Ok((len, source)) => {
                    let result = self.answer(&socket, &buffer[..len], source).await;
                    self.counters.inc(result);
                }
                // The ICMP error of an answer that nobody wanted: it is read once and gone.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot receive a datagram");
                    tokio::time::sleep(ERROR_PAUSE).await;
                }
            }
        }
    }

    async fn answer(
        &self,
        socket: &UdpSocket,
        datagram: &[u8],
        source: SocketAddr,
    ) -> DatagramResult {
        if self.loops.contains(source) {
            return DatagramResult::Loop;
        }
        if *self.state.borrow() != State::Active {
            return DatagramResult::Ignored;
        }
        let Some(answer) = self.handler.datagram(datagram) else {
            return DatagramResult::Ignored;
        };
        // Waits while the send queue is full: what comes meanwhile waits in the receive queue, or is
        // lost there, which UDP's users expect.
        match socket.send_to(&answer, source).await {
            Ok(_) => DatagramResult::Answered,
            Err(error) => {
                tracing::debug!(%error, "cannot send an answer");
                DatagramResult::Ignored
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sources_that_would_answer_back_are_loops() {
        let vip = Ipv4Addr::new(192, 168, 1, 100);
        let loops = LoopSources::new(vip, vec![4007]);
        let client = Ipv4Addr::new(192, 168, 1, 50);
        for port in [7, 9, 13, 17, 19, 37, 4007] {
            assert!(loops.contains((client, port).into()), "{port}");
        }
        for port in [8, 53, 123, 1024, 40_000] {
            assert!(!loops.contains((client, port).into()), "{port}");
        }
        assert!(loops.contains((vip, 40_000).into()));
    }
}
