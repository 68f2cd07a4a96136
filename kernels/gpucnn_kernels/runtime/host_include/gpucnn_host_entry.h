// How a launch calls a kernel: a function that takes the parameters' addresses, with their types deduced from the
// kernel itself, and a description that lets the launch check what it was given.
#pragma once

namespace gpucnn_host {

template <int... Index> struct Sequence {};
template <int Count, int... Index> struct MakeSequence : MakeSequence<Count - 1, Count - 1, Index...> {};
template <int... Index> struct MakeSequence<0, Index...> { typedef Sequence<Index...> type; };

template <class T> struct Kind { static constexpr char letter = __is_enum(T) ? 'i' : 's'; };
template <class T> struct Kind<T *> { static constexpr char letter = 'p'; };
#define GPUCNN_HOST_KIND(TYPE, LETTER) \
    template <> struct Kind<TYPE> { static constexpr char letter = LETTER; };
GPUCNN_HOST_KIND(bool, 'i')
GPUCNN_HOST_KIND(char, 'i')
GPUCNN_HOST_KIND(signed char, 'i')
GPUCNN_HOST_KIND(unsigned char, 'i')
GPUCNN_HOST_KIND(short, 'i')
GPUCNN_HOST_KIND(unsigned short, 'i')
GPUCNN_HOST_KIND(int, 'i')
GPUCNN_HOST_KIND(unsigned int, 'i')
GPUCNN_HOST_KIND(long, 'i')
GPUCNN_HOST_KIND(unsigned long, 'i')
GPUCNN_HOST_KIND(long long, 'i')
GPUCNN_HOST_KIND(unsigned long long, 'i')
GPUCNN_HOST_KIND(float, 'f')
GPUCNN_HOST_KIND(double, 'f')
#undef GPUCNN_HOST_KIND

// The arguments lie outside of everything that a kernel may touch, so the call itself is not instrumented.
template <auto kernel> struct Entry;
template <class... Parameters, void (*kernel)(Parameters...)> struct Entry<kernel> {
    template <int... Index>
    GPUCNN_HOST_NOT_INSTRUMENTED static void call_with(void **arguments, Sequence<Index...>) {
        kernel(*static_cast<Parameters *>(arguments[Index])...);
    }
    static void call(void **arguments) {
        call_with(arguments, typename MakeSequence<sizeof...(Parameters)>::type());
    }
    static constexpr unsigned long sizes[sizeof...(Parameters) + 1] = {sizeof(Parameters)..., 0};
    static constexpr char kinds[sizeof...(Parameters) + 1] = {Kind<Parameters>::letter..., 0};
};

template <auto kernel> constexpr Kernel described(const char *name, int parameter_count) {
    return Kernel{name, &Entry<kernel>::call, parameter_count, Entry<kernel>::sizes, Entry<kernel>::kinds};
}
template <class... Parameters> constexpr int count_parameters(void (*)(Parameters...)) {
    return sizeof...(Parameters);
}

}  // namespace gpucnn_host

// Used by the lines that host.py adds below the kernel's text.
#define GPUCNN_HOST_KERNEL(NAME) gpucnn_host::described<&NAME>(#NAME, gpucnn_host::count_parameters(&NAME))
