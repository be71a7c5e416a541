//! Messages about rings, and the queues that run because of them.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ringvm_backends::device::{End, Suspended};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_vhost_user::files::is_eventfd;
use ringvm_vhost_user::message::{F_SKIP_DRAIN, GET_VRING_BASE_SKIP_DRAIN as SKIP_DRAIN, Message, NO_FILE};
use vhost::vhost_user::message::{VhostUserVringAddr, VhostUserVringState};

use super::{Answer, Backend, Refused, SUSPENDS, malformed, number, payload};
use crate::inflight::Inflight;
use crate::vring::{Addresses, MAX_SIZE, Vring};
use crate::{descriptor, dirty};

/// The payload of SET_VRING_KICK and its kin: the ring, beside a flag for "no descriptor".
const VRING_INDEX: u64 = 0xff;
/// How often to look whether a ring that drains is still wanted to.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Longest time that rings may take for a reset, for requests that can't be cancelled.
const RESET_PATIENCE: Duration = Duration::from_secs(10);

impl Backend<'_> {
    pub(super) fn set_vring_num(&mut self, state: &VhostUserVringState) -> Result<Answer, Refused> {
        let num = state.num;
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= MAX_SIZE);
        let size =
            size.ok_or_else(|| malformed(format!("{num} descriptors are not a power of two up to {MAX_SIZE}")))?;
        let ring = self.ring(state.index)?;
        if ring.runs() && ring.size != Some(size) {
            return Err(malformed("the ring runs"));
        }
        ring.size = Some(size);
        self.settle()?;
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_addr(&mut self, said: &VhostUserVringAddr) -> Result<Answer, Refused> {
        let log = dirty::used_log(said.flags, said.log);
        let logs = self.logging.is_on();
        let addresses = Addresses { desc: said.descriptor, avail: said.available, used: said.used };
        let ring = self.ring(said.index)?;
        if ring.runs() && ring.addresses != Some(addresses) {
            return Err(malformed("the ring runs"));
        }
        ring.addresses = Some(addresses);
        if std::mem::replace(&mut ring.log, log) != log && logs {
            self.stop_ring(said.index as usize)?;
        }
        self.settle()?;
        Ok(Answer::Done)
    }

    /// The ring and the descriptor of a message that brings one.
    fn vring_file(&mut self, message: &Message, file: Option<OwnedFd>) -> Result<(usize, Option<OwnedFd>), Refused> {
        let said = number(message)?;
        if said & !(VRING_INDEX | NO_FILE) != 0 {
            return Err(malformed(format!("{said:#x} is no ring")));
        }
        let index = (said & VRING_INDEX) as u32;
        self.ring(index)?;
        match (said & NO_FILE != 0, &file) {
            (true, Some(_)) => return Err(malformed("a descriptor came, and that there is none")),
            (false, None) => return Err(malformed("its descriptor is missing")),
            _ => {}
        }
        Ok((index as usize, file))
    }

    /// The ring, and the interrupt made of the descriptor of a message.
    fn vring_interrupt(&mut self, message: &Message, file: Option<OwnedFd>) -> Result<(usize, Interrupt), Refused> {
        let (index, file) = self.vring_file(message, file)?;
        let interrupt = file.map(descriptor::interrupt).transpose().map_err(Refused::Event)?;
        Ok((index, interrupt.unwrap_or_default()))
    }

    pub(super) fn set_vring_base(&mut self, state: &VhostUserVringState) -> Result<Answer, Refused> {
        let base = u16::try_from(state.num).map_err(|_| malformed("an index of more than 16 bits"))?;
        let ring = self.ring(state.index)?;
        if ring.runs() && ring.base != base {
            return Err(malformed("the ring runs"));
        }
        ring.base = base;
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_kick(&mut self, message: &Message, file: Option<OwnedFd>) -> Result<Answer, Refused> {
        let (index, file) = self.vring_file(message, file)?;
        let file = file.ok_or_else(|| malformed("a ring without a kick would have to be polled; give it one"))?;
        if !is_eventfd(file.as_fd()) {
            return Err(malformed("its descriptor is not an eventfd"));
        }
        self.stop_ring(index)?;
        self.rings[index].kick = Some(file);
        self.settle()?;
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_call(&mut self, message: &Message, file: Option<OwnedFd>) -> Result<Answer, Refused> {
        let (index, call) = self.vring_interrupt(message, file)?;
        // Interrupts raised on the old descriptor may have been missed: the queue starts again and interrupts once.
        self.stop_ring(index)?;
        self.rings[index].call = call;
        self.settle()?;
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_err(&mut self, message: &Message, file: Option<OwnedFd>) -> Result<Answer, Refused> {
        let (index, err) = self.vring_interrupt(message, file)?;
        self.stop_ring(index)?;
        self.rings[index].err = err;
        self.settle()?;
        Ok(Answer::Done)
    }

    pub(super) fn set_vring_enable(&mut self, state: &VhostUserVringState) -> Result<Answer, Refused> {
        let enabled = match state.num {
            0 => false,
            1 => true,
            _ => return Err(malformed("neither on nor off")),
        };
        self.ring(state.index)?.enabled = enabled;
        self.settle()?;
        Ok(Answer::Done)
    }

    /// Stops the rings that these messages want ended at once, together.
    pub(crate) fn suspend(&mut self, messages: &[Message]) -> Result<(), Refused> {
        if !self.protocol.contains(F_SKIP_DRAIN) {
            return Ok(());
        }
        let asked = messages.iter().filter(|message| message.request == SKIP_DRAIN && message.files.is_ok());
        let rings = asked.filter_map(|message| Some(message.parse::<VhostUserVringState>()?.index as usize));
        self.suspend_rings(rings.filter(|&index| index < self.rings.len()).collect())
    }

    /// Ends a ring that was suspended ([`SKIP_DRAIN`]).
    pub(crate) fn skip_drain(&mut self, message: &Message) -> Result<Answer, Refused> {
        if !self.protocol.contains(F_SKIP_DRAIN) {
            return Err(malformed("it goes with a protocol feature that was not accepted"));
        }
        if let Err(wrong) = &message.files {
            return Err(malformed(wrong.to_string()));
        }
        self.vring_base(message)
    }

    /// Stops rings and leaves requests that can be cancelled in their tables. Rings without a table are drained when
    /// they end: no successor would hear of the requests left.
    fn suspend_rings(&mut self, mut rings: Vec<usize>) -> Result<(), Refused> {
        rings.sort_unstable();
        rings.dedup();
        rings.retain(|&index| {
            self.inflight.as_ref().is_some_and(|inflight| inflight.area().table(index as u16).is_some())
        });
        self.stop_rings(rings, End::Suspended).map(drop)
    }

    /// Ends a ring, and first suspends it if the frontend has negotiated that.
    pub(super) fn get_vring_base(&mut self, message: &Message) -> Result<Answer, Refused> {
        if self.protocol.contains(SUSPENDS) && !self.protocol.contains(F_SKIP_DRAIN) {
            let state: VhostUserVringState = payload(message)?;
            self.ring(state.index)?;
            self.suspend_rings(vec![state.index as usize])?;
        }
        self.vring_base(message)
    }

    fn vring_base(&mut self, message: &Message) -> Result<Answer, Refused> {
        let state: VhostUserVringState = payload(message)?;
        self.ring(state.index)?;
        let base = self.end_ring(state.index as usize)?;
        Ok(Answer::value(&VhostUserVringState::new(state.index, base.into())))
    }

    pub(super) fn ring(&mut self, index: u32) -> Result<&mut Vring, Refused> {
        let count = self.rings.len();
        self.rings.get_mut(index as usize).ok_or_else(|| malformed(format!("ring {index} of {count}")))
    }

    /// Starts and stops rings until those run that can and should.
    pub(super) fn settle(&mut self) -> Result<(), Refused> {
        let mut result = Ok(());
        for index in 0..self.rings.len() {
            let log = self.logging.of_ring(self.rings[index].log);
            let ring = &mut self.rings[index];
            let wanted = self.features.is_some()
                && (ring.enabled || !self.negotiates)
                && ring.is_complete()
                && !self.memory.is_empty();
            if !wanted {
                self.stop_ring(index)?;
            } else if !ring.runs() {
                let inflight = self.inflight.as_ref().map(Inflight::area);
                let started = ring.start(index as u16, self.device, &self.memory, inflight, log, &self.broken);
                if started.is_ok() {
                    self.state.forget();
                }
                if let Err(error) = started {
                    // Not again with every message: with a new doorbell.
                    ring.kick = None;
                    result = result.and(Err(error.into()));
                }
            }
        }
        result
    }

    pub(super) fn stop_ring(&mut self, index: usize) -> Result<(), Refused> {
        self.stop_rings(vec![index], End::Drained).map(drop)
    }

    pub(super) fn stop_all(&mut self, end: End) -> Result<(), Refused> {
        self.stop_rings((0..self.rings.len()).collect(), end).map(drop)
    }

    /// Stops those of the rings that run, and returns their positions. Waits for their requests in flight as long as
    /// the answer is wanted; after that the rings are suspended, and the session is over.
    fn stop_rings(&mut self, mut rings: Vec<usize>, end: End) -> Result<Vec<(usize, Suspended)>, Refused> {
        rings.retain(|&index| self.rings[index].runs());
        if rings.is_empty() {
            return Ok(Vec::new());
        }
        let indices: Vec<u16> = rings.iter().map(|&index| index as u16).collect();
        let limit = (end == End::Suspended).then(|| Instant::now() + RESET_PATIENCE);
        let mut stopping = self.device.stop(&indices, end);
        let ends = loop {
            let look = Instant::now() + LOOK_PAUSE;
            stopping = match stopping.wait_until(look) {
                Ok(ends) => break ends,
                Err(stopping) => stopping,
            };
            if !self.wanted.still() {
                return Err(Refused::Unwanted);
            }
            if limit.is_some_and(|limit| look > limit) {
                return Err(Refused::Busy);
            }
        };
        for (&index, end) in rings.iter().zip(&ends) {
            self.rings[index].stopped(end.as_ref());
        }
        Ok(rings.into_iter().zip(ends).filter_map(|(index, end)| Some((index, end?))).collect())
    }

    /// Stops a ring until it gets another doorbell, and says where it is.
    fn end_ring(&mut self, index: usize) -> Result<u16, Refused> {
        self.stop_ring(index)?;
        self.rings[index].kick = None;
        Ok(self.rings[index].base)
    }

    pub(super) fn end_all(&mut self, end: End) -> Result<Vec<(usize, Suspended)>, Refused> {
        let ends = self.stop_rings((0..self.rings.len()).collect(), end)?;
        self.rings.iter_mut().for_each(|ring| ring.kick = None);
        Ok(ends)
    }
}
