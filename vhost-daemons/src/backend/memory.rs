//! Messages about the memory that the frontend shares.

use std::os::fd::OwnedFd;

use ringvm_backends::device::End;
use ringvm_vhost_user::message::{MAX_FILES, Message};
use vhost::vhost_user::message::{VhostUserMemory, VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vm_memory::ByteValued;

use super::{Answer, Backend, Refused, malformed, payload, too_short};
use crate::mailbox::Event;
use crate::memory::{Memory, MemoryError};

impl Backend<'_> {
    pub(super) fn add_mem_reg(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: Option<OwnedFd>,
    ) -> Result<Answer, Refused> {
        let file = file.ok_or_else(|| malformed("a region without a descriptor"))?;
        // QEMU's net device says each region once for each pair.
        if !self.memory.has(region) {
            self.change_memory(|memory, alarm| memory.add(region, file, alarm))?;
        }
        Ok(Answer::Done)
    }

    pub(super) fn rem_mem_reg(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<Answer, Refused> {
        let index = self.memory.find(region)?;
        self.change_memory(|memory, _| memory.remove(index))?;
        Ok(Answer::Done)
    }

    pub(super) fn set_mem_table(&mut self, message: &Message, files: Vec<OwnedFd>) -> Result<Answer, Refused> {
        let head: VhostUserMemory = payload(message)?;
        let count = head.num_regions as usize;
        if count > MAX_FILES || count != files.len() {
            return Err(malformed(format!("{count} regions with {} descriptors", files.len())));
        }
        let mut table = Vec::with_capacity(count);
        let mut rest = &message.body[size_of::<VhostUserMemory>()..];
        for file in files {
            let mut region = VhostUserMemoryRegion::default();
            let (bytes, behind) =
                rest.split_at_checked(size_of::<VhostUserMemoryRegion>()).ok_or_else(|| too_short(message))?;
            region.as_mut_slice().copy_from_slice(bytes);
            rest = behind;
            table.push((region, file));
        }
        let new = Memory::new(table, &self.alarm)?;
        self.change_memory(|memory, _| {
            *memory = new;
            Ok(())
        })?;
        Ok(Answer::Done)
    }

    /// Changes the memory while nothing uses it.
    fn change_memory(
        &mut self,
        change: impl FnOnce(&mut Memory, &Event) -> Result<(), MemoryError>,
    ) -> Result<(), Refused> {
        self.stop_all(End::Drained)?;
        let changed = change(&mut self.memory, &self.alarm);
        let settled = self.settle();
        changed?;
        settled
    }
}
