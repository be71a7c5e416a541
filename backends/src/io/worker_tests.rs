//! Workers whose requests wait for others, and queues that wait for their time.

use std::collections::VecDeque;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::io::queues::Queues;
use crate::io::reactor::{ReactorOptions, ReactorPool};
use crate::io::service::TaskHandle;
use crate::io::tasks::spawn;
use crate::testing::driver::{Buffer, Driver};
use crate::virtqueue::interrupt::Interrupt;
use crate::virtqueue::split::Queue;
use crate::virtqueue::{End, GuestMemory, QueueParts, QueueState};

const PATIENCE: Duration = Duration::from_secs(20);
const OPS: &[&str] = &["request"];

fn driver() -> (GuestMemory, Driver) {
    let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let mut driver = Driver::new(Arc::clone(&mem), 0, 16, 0);
    for at in 0..4 {
        driver.add(&[Buffer { addr: 0x8_0000 + at * 64, len: 64, writable: true }]).unwrap();
    }
    driver.publish();
    (mem, driver)
}

fn service(mem: GuestMemory, driver: &Driver, handle: TaskHandle) -> Service {
    let queue = Queue::new(mem, &driver.ring(), 0, QueueState::default(), Interrupt::None).unwrap();
    Service::new(tracing::Span::none(), queue, Interrupt::None, handle, OPS)
}

/// Requests that wait until they are named.
#[derive(Clone, Default)]
struct Patient {
    named: Arc<Mutex<VecDeque<u32>>>,
    waker: Arc<Mutex<Option<Waker>>>,
    started: Arc<Mutex<Vec<u32>>>,
}

impl Patient {
    fn name(&self, slot: u32) {
        self.named.lock().unwrap().push_back(slot);
        self.waker.lock().unwrap().as_ref().expect("it is served").wake_by_ref();
    }
}

impl Handler for Patient {
    type Request = ();
    const OPS: &'static [&'static str] = OPS;

    fn attached(&mut self, waker: &Waker) {
        *self.waker.lock().unwrap() = Some(waker.clone());
    }

    fn start(&mut self, _: &mut Chain, (): &mut (), io: &mut Io<'_>) -> Step {
        self.started.lock().unwrap().push(io.slot());
        Step::Pending
    }

    fn resume(&mut self, _: &mut Chain, (): &mut (), _: i32, _: &mut Io<'_>) -> Step {
        Step::Done(Outcome { op: 0, written: 0, bytes: 0, ok: true })
    }

    fn is_waiting(&self, (): &()) -> bool {
        true
    }

    fn next_woken(&mut self) -> Option<u32> {
        self.named.lock().unwrap().pop_front()
    }
}

#[test]
fn any_thread_wakes_a_request_and_it_alone() {
    let pool = ReactorPool::new(&ReactorOptions::default()).unwrap();
    let (mem, mut driver) = driver();
    let patient = Patient::default();
    let handler = patient.clone();
    let parts = QueueParts::new(driver.ring(), mem, EventFd::new(EFD_NONBLOCK).unwrap());
    let mut queues = Queues::new("test", 1, pool);
    queues.start(0, parts, 0, move || handler).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while patient.started.lock().unwrap().len() < 4 {
        assert!(Instant::now() < deadline, "the requests were not started");
        std::thread::yield_now();
    }
    for slot in [2, 0, 3] {
        patient.name(slot);
        let used = loop {
            if let Some((head, _)) = driver.next_used() {
                break head;
            }
            assert!(Instant::now() < deadline, "request {slot} was not woken");
            std::thread::yield_now();
        };
        // Slots are given out in the driver's order.
        assert_eq!(u32::from(used), slot);
    }
    // The last waits still, and a queue that is suspended leaves it.
    let ended = queues.stop(&[0], End::Suspended).wait().remove(0).expect("it ran");
    assert_eq!(ended.left, [1]);
    // Whoever keeps the waker of a queue that has gone may use it.
    patient.name(1);
    assert!(driver.next_used().is_none());
}

#[test]
fn a_request_that_the_host_does_not_complete_is_told_of_less_and_less_often() {
    let (mem, driver) = driver();
    let patient = Patient::default();
    let mut worker = Worker::new(service(mem, &driver, TaskHandle::unthreaded(0)), patient.clone());
    let mut ring = Ring::new().unwrap();
    assert_eq!(worker.next_wake(), None, "an idle queue waits for nothing");
    assert!(worker.turn(&mut ring));
    let begun = worker.slots[0].seen;
    assert_eq!(worker.next_wake(), Some(begun + LATE));
    let mut looks = Vec::new();
    for _ in 0..5 {
        let at = worker.next_wake().unwrap();
        worker.due(at);
        looks.push((at - begun).as_secs());
    }
    assert_eq!(looks, [10, 20, 40, 80, 160]);
    // The oldest one ends; those that came with it are as late.
    patient.name(0);
    worker.woken(Instant::now(), &mut ring);
    worker.due(begun + LATE);
    assert_eq!(worker.late_looks, 6);
    (1..4).for_each(|slot| patient.name(slot));
    worker.woken(Instant::now(), &mut ring);
    worker.due(begun + 100 * LATE);
    assert_eq!((worker.next_wake(), worker.late_looks), (None, 0));
}

/// A task that does nothing but wait for its time, again and again, or never rests.
struct Sleeper {
    service: Service,
    rests: bool,
    at: Instant,
    tell: mpsc::Sender<(Instant, Instant)>,
}

const NAP: Duration = Duration::from_micros(300);

impl Task for Sleeper {
    fn service(&mut self) -> &mut Service {
        &mut self.service
    }

    fn turn(&mut self, _: &mut Ring) -> bool {
        !self.rests
    }

    fn next_wake(&self) -> Option<Instant> {
        Some(self.at)
    }

    fn due(&mut self, now: Instant) {
        _ = self.tell.send((self.at, now));
        self.at = now + NAP;
    }

    fn completed(&mut self, _: u32, _: i32, _: Instant, _: &mut Ring) {}

    fn ready(&self) -> bool {
        false
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn files(&self, _: &mut dyn FnMut(BorrowedFd<'_>)) {}

    fn stop(&mut self, _: &mut Ring) {}

    fn is_idle(&self) -> bool {
        true
    }
}

/// Has the thread serve a sleeper; the times that it is called at come by the channel.
fn sleeper(pool: &ReactorPool, rests: bool, tell: &mpsc::Sender<(Instant, Instant)>) {
    let ((mem, driver), tell) = (driver(), tell.clone());
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    let build = move |handle| {
        let service = service(mem, &driver, handle);
        Box::new(Sleeper { service, rests, at: Instant::now() + NAP, tell }) as Box<dyn Task>
    };
    pool.get(0).unwrap().attach(kick, build).unwrap();
}

#[test]
fn a_task_is_called_when_its_time_has_come_and_not_before() {
    // Two of them: the thread has one timer for all.
    for rest in [[true, true], [true, false]] {
        let pool = ReactorPool::new(&ReactorOptions::default()).unwrap();
        let (tell, told) = mpsc::channel();
        rest.iter().for_each(|&rests| sleeper(&pool, rests, &tell));
        for _ in 0..200 {
            let (at, called) = told.recv_timeout(PATIENCE).expect("the thread sleeps too long");
            assert!(at <= called, "{:?} too early", at - called);
        }
    }
}

#[test]
fn async_code_goes_on_beside_a_queue_that_never_rests() {
    let pool = ReactorPool::new(&ReactorOptions::default()).unwrap();
    let (ignore, _ignored) = mpsc::channel();
    sleeper(&pool, false, &ignore);
    let (tell, told) = mpsc::channel();
    pool.get(0).unwrap().call(move || {
        spawn(async move {
            let file = tokio_uring::fs::File::open("/proc/self/stat").await.unwrap();
            for _ in 0..50 {
                let (count, _) = file.read_at(vec![0; 8], 0).await;
                tell.send(count.unwrap()).unwrap();
            }
        });
    });
    for _ in 0..50 {
        assert_eq!(told.recv_timeout(PATIENCE).expect("the runtime is not served"), 8);
    }
}
