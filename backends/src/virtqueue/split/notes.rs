//! What a queue notes of its chains for others: the requests in flight for a successor, the written pages for a copy
//! of the guest. Most queues have neither, so both lie behind one pointer that a chain tests once.

use crate::virtqueue::buffers::Chain;
use crate::virtqueue::dirty::Writes;
use crate::virtqueue::inflight::{InflightTable, crash_point};

/// The notes of one queue.
#[derive(Default)]
pub(super) struct Notes {
    /// Where the heads in flight are noted for a successor.
    pub(super) table: Option<InflightTable>,
    /// Notes the written pages, if there is a log.
    pub(super) writes: Option<Writes>,
}

impl Notes {
    /// A chain was popped. The table knows of those that a predecessor has left.
    pub(super) fn popped(&mut self, chain: &Chain, is_new: bool) {
        if let Some(table) = self.table.as_mut().filter(|_| is_new) {
            table.popped(chain.head);
        }
        if let Some(writes) = &mut self.writes {
            writes.taken(chain.head, &chain.writable);
        }
    }

    /// The last `pop` was taken back.
    pub(super) fn unpopped(&mut self, head: u16) {
        if let Some(table) = &mut self.table {
            table.returned(head);
        }
        if let Some(writes) = &mut self.writes {
            // A frame that was dropped may have come into it.
            writes.returned(head);
        }
    }

    /// A head was put into the used ring, and is not published.
    pub(super) fn completed(&mut self, head: u16) {
        if let Some(writes) = &mut self.writes {
            writes.returned(head);
        }
        if let Some(table) = &mut self.table {
            crash_point();
            table.completed(head);
        }
    }

    /// The used index was published.
    pub(super) fn published(&mut self, used: u16) {
        if let Some(writes) = &self.writes {
            writes.used_written(2, 2);
            writes.tell();
        }
        if let Some(table) = &mut self.table {
            crash_point();
            table.published(used);
        }
    }
}
