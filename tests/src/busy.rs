//! Processors that have other things to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Busy loops at ordinary priority, until dropped.
#[derive(Debug)]
pub struct Busy {
    over: Arc<AtomicBool>,
    loops: Vec<JoinHandle<()>>,
}

impl Busy {
    /// So many on each core.
    pub fn cores(loops_each: usize) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let loops = (0..cores * loops_each).map(|_| {
            let over = Arc::clone(&over);
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        });
        Self {
            loops: loops.collect(),
            over,
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for busy in self.loops.drain(..) {
            busy.join().ok();
        }
    }
}
