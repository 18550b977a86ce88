//! One TCP connection: a handler between two bounded buffers.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rfsis_common::maps::FlowKey;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;

use super::connections::{Asked, Turn};
use super::{Connections, Epoch, FlowGate};
use crate::adopt::OpenFlow;
use crate::handler::StreamHandler;

/// Most bytes of the client that wait for the handler, and of the handler that wait for the client.
const BUFFER_LIMIT: usize = 64 * 1024;
/// What a buffer begins with, bytes.
const BUFFER_FIRST: usize = 4 * 1024;
/// A connection that is idle for so long gives its buffers back.
const REST: Duration = Duration::from_millis(100);
/// One that is asked for a snapshot first does what there is to do, at most so many turns of it: what the
/// handler has taken, and what the client has acknowledged, need not be handed over. The client's window
/// bounds what can still come.
const TURNS_TO_REST: u32 = 64;
/// After the answer is complete a client may be silent for this long before it is cut.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Where a connection's service begins.
pub(super) struct Start {
    pub handler: Box<dyn StreamHandler>,
    /// What was read already and is still to be handled.
    pub input: Vec<u8>,
    /// Bytes behind those that the client may send whatever the handler does.
    pub promised: usize,
    /// Of a connection that was adopted.
    pub entry: Option<OpenFlow>,
}

impl Start {
    /// At the beginning.
    pub(super) fn of(handler: Box<dyn StreamHandler>) -> Self {
        Self {
            handler,
            input: Vec::new(),
            promised: 0,
            entry: None,
        }
    }
}

/// A connection in the epoch in which it was accepted.
pub(super) struct Connection {
    pub stream: TcpStream,
    pub flow: FlowKey,
    pub gate: Arc<dyn FlowGate>,
    pub connections: Arc<Connections>,
}

impl Connection {
    /// Serves until both sides are done, something fails, or the epoch ends.
    pub(super) async fn serve(mut self, start: Start, epoch: Epoch) {
        let Start {
            mut handler,
            input,
            promised,
            entry,
        } = start;
        let input = Buffer::of(input, promised);
        tokio::select! {
            biased;
            () = epoch.ended() => abort(&self.stream),
            () = self.converse(&mut *handler, input, entry) => {}
        }
    }

    async fn converse(
        &mut self,
        handler: &mut dyn StreamHandler,
        input: Buffer,
        entry: Option<OpenFlow>,
    ) {
        let asked = self.connections.register(self.flow);
        let outcome = exchange(&self.stream, handler, input, &asked).await;
        drop(asked);
        // Once both sides have ended it the kernel answers what comes late by a reset, though the socket is open.
        drop(entry);
        // All that follows may send a FIN or RST: the half-close, and the drop that closes.
        if let Err(error) = self.gate.approve(self.flow) {
            tracing::warn!(flow = ?self.flow, %error, "cannot approve the end of a connection");
        }
        let outcome = match outcome {
            Ok(()) => self.half_close_and_drain().await,
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            tracing::debug!(flow = ?self.flow, %error, "connection ended early");
        }
    }

    /// Closing with the client's bytes unread would reset the connection (RFC 2525 section 2.17)
    /// and could destroy the end of the answer on its way.
    async fn half_close_and_drain(&mut self) -> io::Result<()> {
        self.stream.shutdown().await?;
        let mut waste = vec![0; BUFFER_FIRST];
        loop {
            let read = tokio::time::timeout(DRAIN_TIMEOUT, self.stream.read(&mut waste)).await;
            match read {
                Ok(Ok(0)) => return Ok(()),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error),
                Err(elapsed) => return Err(elapsed.into()),
            }
        }
    }
}

/// Makes the drop of the socket an abort (RFC 9293 section 3.10.5): an RST, nothing retransmitted.
/// Nobody approved it, so the gate keeps it from the client.
pub(super) fn abort(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::warn!(%error, "a stale connection ends by FIN, not by RST");
    }
}

/// Runs the handler until it has finished and all it wrote is with the kernel.
async fn exchange(
    stream: &TcpStream,
    handler: &mut dyn StreamHandler,
    mut input: Buffer,
    asked: &Asked,
) -> io::Result<()> {
    let mut output = Buffer::default();
    let mut eof = false;
    let mut finished = false;
    let mut turns_asked = 0;
    let mut begun = false;
    loop {
        // A fast client could otherwise keep the worker to itself.
        consume_budget().await;
        let mut moved = false;
        while !eof && !finished && !input.is_full() {
            match stream.try_read(input.room()) {
                Ok(0) => {
                    eof = true;
                    moved = true;
                }
                Ok(count) => {
                    input.fill(count);
                    moved = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        while !finished {
            let progress = handler.advance(input.bytes(), eof, output.room());
            input.consume(progress.consumed);
            output.fill(progress.produced);
            finished = progress.finished;
            if progress.consumed == 0 && progress.produced == 0 {
                break;
            }
            moved = true;
        }
        while !output.is_empty() {
            match stream.try_write(output.bytes()) {
                Ok(count) => {
                    output.consume(count);
                    moved = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if finished && output.is_empty() {
            return Ok(());
        }
        turns_asked = if asked.is_asked() { turns_asked + 1 } else { 0 };
        if !moved || turns_asked > TURNS_TO_REST {
            asked.answer(&Turn {
                socket: stream.as_fd(),
                handler,
                input: input.bytes(),
                output: output.bytes(),
                finished,
            });
        }
        begun |= moved;
        if !moved && input.is_full() && input.grow_as_promised() {
            continue;
        }
        if !moved {
            let read = (!eof && !finished && !input.is_full()).then_some(Interest::READABLE);
            let write = (!output.is_empty()).then_some(Interest::WRITABLE);
            let interest = match (read, write) {
                (Some(read), Some(write)) => read | write,
                (Some(one), None) | (None, Some(one)) => one,
                (None, None) => return Err(io::Error::other("the handler waits for nothing")),
            };
            // One that only pauses would get its memory anew each time, and the kernel clear it. One that has not begun
            // gives it back at once: where thousands are adopted together the next takes it.
            if begun {
                let rest = tokio::time::timeout(REST, ready(stream, interest, asked));
                if let Ok(ready) = rest.await {
                    ready?;
                    continue;
                }
            }
            input.release();
            output.release();
            ready(stream, interest, asked).await?;
        }
    }
}

/// Returns when the socket may be ready, or somebody asks for a snapshot.
async fn ready(stream: &TcpStream, interest: Interest, asked: &Asked) -> io::Result<()> {
    tokio::select! {
        ready = stream.ready(interest) => ready.map(drop),
        () = asked.wait() => Ok(()),
    }
}

/// Bytes in order, at most [`BUFFER_LIMIT`] unless it began with more, or more was promised; without memory while it
/// is empty and released.
struct Buffer {
    data: Vec<u8>,
    start: usize,
    end: usize,
    limit: usize,
    /// A shadow had room for so many bytes that are still to come, and said so.
    promised: usize,
}

impl Default for Buffer {
    fn default() -> Self {
        Self::of(Vec::new(), 0)
    }
}

impl Buffer {
    fn of(data: Vec<u8>, promised: usize) -> Self {
        let end = data.len();
        Self {
            data,
            start: 0,
            end,
            limit: BUFFER_LIMIT,
            promised,
        }
    }

    /// Makes room for more of what was promised, if any of that is left. The kernel, in which a socket's memory is
    /// bounded, would drop what it has no room for; and then, of a client that has sent a little beyond the window
    /// that is closed now, every acknowledgement (`tcp_sequence`, net/ipv4/tcp_input.c). A handler that waits for one
    /// would wait for good.
    fn grow_as_promised(&mut self) -> bool {
        self.limit = self.end - self.start + self.promised.min(BUFFER_LIMIT);
        self.promised > 0
    }

    fn bytes(&self) -> &[u8] {
        &self.data[self.start..self.end]
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn is_full(&self) -> bool {
        self.end - self.start >= self.limit
    }

    /// Free space behind the bytes; empty only when the buffer is full.
    fn room(&mut self) -> &mut [u8] {
        if self.end == self.data.len() && self.start > 0 {
            self.data.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.data.len() && self.data.len() < self.limit {
            let larger = (self.data.len() * 2).max(BUFFER_FIRST);
            self.data.resize(larger.min(self.limit), 0);
        }
        let free = self.limit.saturating_sub(self.end - self.start);
        let end = self.data.len().min(self.end + free);
        &mut self.data[self.end..end]
    }

    /// `count` bytes of the room were written.
    fn fill(&mut self, count: usize) {
        self.end += count;
        self.promised = self.promised.saturating_sub(count);
        debug_assert!(self.end <= self.data.len());
    }

    /// `count` bytes at the front are done with.
    fn consume(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end);
        if self.is_empty() {
            self.start = 0;
            self.end = 0;
        }
        if count > 0 {
            self.limit = BUFFER_LIMIT;
        }
    }

    /// Gives the memory back if nothing is in it, so that an idle connection costs none.
    fn release(&mut self) {
        if self.is_empty() {
            *self = Self::of(Vec::new(), self.promised);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    proptest::proptest! {
        #[test]
        fn buffer_keeps_every_byte_in_order(
            steps in proptest::collection::vec((proptest::bool::ANY, 0usize..40_000), 1..60),
            promised in 0usize..200_000,
        ) {
            let mut buffer = Buffer::of(Vec::new(), promised);
            let mut filled = 0;
            let mut model = VecDeque::new();
            let mut next = 0u8;
            for (fills, size) in steps {
                if fills {
                    // What the handler does not take changes nothing.
                    buffer.consume(0);
                    let full = buffer.is_full();
                    let grown = full && buffer.grow_as_promised();
                    proptest::prop_assert_eq!(grown, full && filled < promised);
                    buffer.consume(0);
                    proptest::prop_assert_eq!(buffer.is_full(), full && !grown);
                    let room = buffer.room();
                    let count = size.min(room.len());
                    filled += count;
                    for byte in &mut room[..count] {
                        *byte = next;
                        model.push_back(next);
                        next = next.wrapping_add(1);
                    }
                    buffer.fill(count);
                } else {
                    let count = size.min(model.len());
                    buffer.consume(count);
                    model.drain(..count);
                    buffer.release();
                }
                proptest::prop_assert!(model.iter().eq(buffer.bytes()));
                proptest::prop_assert!(model.len() <= BUFFER_LIMIT.max(promised));
                proptest::prop_assert_eq!(buffer.room().is_empty(), buffer.is_full());
            }
        }

        #[test]
        fn an_empty_buffer_holds_no_memory_after_release(size in 1usize..BUFFER_LIMIT) {
            let mut buffer = Buffer::default();
            let count = size.min(buffer.room().len());
            buffer.fill(count);
            buffer.consume(count);
            buffer.release();
            proptest::prop_assert_eq!(buffer.data.capacity(), 0);
        }
    }
}
