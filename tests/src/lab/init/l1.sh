#!/bin/busybox sh
# L1 in its root disk: the agent on the virtio-serial port is all there is.
export PATH=/bin HOME=/ LANG=C.UTF-8 TERM=screen
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm /tmp /run /scratch
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
ip link set lo up
port=
tries=0
while [ -z "$port" ] && [ "$tries" -lt 100 ]; do
    for name in /sys/class/virtio-ports/*/name; do
        [ "$(cat "$name" 2>/dev/null)" = ringvm.agent ] && port=/dev/$(basename "$(dirname "$name")")
    done
    [ -n "$port" ] || sleep 0.1
    tries=$((tries + 1))
done
lab-agent "$port"
echo "lab: the agent ended"
sync
poweroff -f
