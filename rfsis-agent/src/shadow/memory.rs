//! The memory of a shadow's socket, which the next shadow uses again.
//!
//! It is a mapping of its own (`sys::map_large_buffers`), so that pages which nobody touches cost nothing. To give one back
//! costs the kernel some 10 µs, which was half of what a standby did where connections are short; so what a short one
//! leaves behind, of which little was touched, is kept for the next.

use std::cell::RefCell;
use std::ptr::NonNull;

use smoltcp::socket::tcp::SocketBuffer;

use super::BUFFER;

/// Of either buffer as many bytes may have been used if it is to be kept: a page, which is touched anyway.
const KEPT_USE: u64 = 4096;

/// So many are kept at the most: 8 KiB each that count, 128 that do not.
const KEPT_MOST: usize = 16_384;

thread_local! {
    /// What shadows of this thread have left behind.
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// Room for a receive and a send buffer, lent to a socket.
#[derive(Debug)]
pub(super) struct Lent {
    memory: NonNull<[u8]>,
    used: u64,
}

// SAFETY: it is the only owner of the memory, as a `Box` would be.
unsafe impl Send for Lent {}

impl Lent {
    /// From those that were left behind, or new.
    pub(super) fn take() -> Self {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        let bytes = spare.unwrap_or_else(|| vec![0; 2 * BUFFER].into_boxed_slice());
        Self {
            memory: NonNull::from(Box::leak(bytes)),
            used: 0,
        }
    }

    /// Receive and send buffer.
    ///
    /// # Safety
    /// They are gone when this is, and are asked for once.
    pub(super) unsafe fn buffers(&mut self) -> [SocketBuffer<'static>; 2] {
        // SAFETY: the memory is leaked until `drop`; nobody else refers to it.
        let (receive, send) = unsafe { self.memory.as_mut() }.split_at_mut(BUFFER);
        [SocketBuffer::new(receive), SocketBuffer::new(send)]
    }

    /// So many bytes have gone through one of them.
    pub(super) fn note_use(&mut self, bytes: u64) {
        self.used = self.used.max(bytes);
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // SAFETY: it was leaked from a `Box` by `take`, and the buffers are gone.
        let memory = unsafe { Box::from_raw(self.memory.as_ptr()) };
        if self.used <= KEPT_USE {
            // Fails where the thread is about to end.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                if spare.len() < KEPT_MOST {
                    spare.push(memory);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(lent: &Lent) -> usize {
        lent.memory.as_ptr().addr()
    }

    #[test]
    fn what_was_hardly_used_is_used_again_and_the_rest_given_back() {
        let mut first = Lent::take();
        first.note_use(KEPT_USE);
        let (kept, second) = (address(&first), Lent::take());
        assert_ne!(address(&second), kept, "two at once");
        drop(first);
        let mut again = Lent::take();
        assert_eq!(address(&again), kept);
        again.note_use(KEPT_USE + 1);
        again.note_use(1);
        drop(again);
        SPARE.with_borrow(|spare| assert!(spare.is_empty()));
    }

    #[test]
    fn no_more_are_kept_than_the_bound() {
        let many: Vec<Lent> = (0..KEPT_MOST + 5).map(|_| Lent::take()).collect();
        drop(many);
        SPARE.with_borrow(|spare| assert_eq!(spare.len(), KEPT_MOST));
    }

    #[test]
    fn buffers_are_as_large_as_a_shadow_needs_and_apart() {
        let mut lent = Lent::take();
        // SAFETY: dropped before `lent`.
        let [mut receive, mut send] = unsafe { lent.buffers() };
        assert_eq!((receive.capacity(), send.capacity()), (BUFFER, BUFFER));
        assert_eq!(receive.enqueue_slice(&[1; BUFFER]), BUFFER);
        assert_eq!(send.enqueue_slice(&[2; BUFFER]), BUFFER);
        assert!(receive.dequeue_many(BUFFER).iter().all(|byte| *byte == 1));
        drop((receive, send));
    }
}
